// Experts of many tokens in matrix tiles (simd_amx.h), bf16 weights: their time is that of their
// bytes up to some hundred tokens. x and act(gate) * up are rounded to bf16, to nearest, as plain
// torch does: a relative error of at most 2^-9 each. Included inside a namespace, after
// expert_ffn_tile.h and simd_amx.h, hence no #pragma once.

// A block of tokens is packed as [padded_k / 2][16][2] bf16, zero past K and past the last token;
// with DENSE_TOKENS tokens it fits the floats that it would take otherwise.
inline constexpr int DENSE_TOKENS = 8, DENSE_ROWS = 2 * TILE;
inline constexpr int DENSE_FREE = 128;  // tokens that cost no more than the expert's bytes

inline uint32_t round_to_bf16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return v == v ? rounded : bits >> 16 | 0x40;  // a quiet NaN
}
inline uint32_t bf16_bits(bf16 v) {
  return v.bits;
}
template <class X>
uint32_t bf16_bits(X v) {
  return round_to_bf16(to_float(v));
}

template <class X>
void pack_dense(const X* x, const int32_t* token, int count, int64_t k, float* out) {
  const int64_t steps = (k + TILE_K - 1) / TILE_K;
  std::memset(out, 0, steps * TILE_K * TILE * sizeof(bf16));
  for (int n = 0; n < count; ++n) {
    const X* row = x + token[n] * k;
    for (int64_t i = 0; i < k; i += 2) {
      const uint32_t pair = bf16_bits(row[i]) | (i + 1 < k ? bf16_bits(row[i + 1]) << 16 : 0);
      std::memcpy(out + i / 2 * TILE + n, &pair, sizeof(pair));
    }
  }
}

// 16 x 32 weights for a tile that would read past the rows or past K.
inline const bf16* stage(const bf16* w, int64_t w_stride, int64_t rows, int64_t k, bf16* staging) {
  std::memset(staging, 0, TILE * TILE_K * sizeof(bf16));
  for (int64_t r = 0; r < std::min<int64_t>(rows, TILE); ++r)
    std::memcpy(staging + r * TILE_K, w + r * w_stride, std::min<int64_t>(k, TILE_K) * sizeof(bf16));
  return staging;
}

// out[r * width + t] = w[r] . x[t] for R tiles of rows, of which `rows` exist, and the tokens of B
// blocks, x and x1. Meanwhile the rows from `ahead` on (may be null) are fetched to the L2 cache.
template <int R, int B>
void dense_tile(Tiles& tiles, const bf16* w, int64_t w_stride, int rows, int64_t k, const float* x,
                const float* x1, const bf16* ahead, float* out, int64_t width, bf16* staging) {
  const auto each = [](auto f) {
    f.template operator()<0, 0>();
    if constexpr (B > 1) f.template operator()<0, 1>();
    if constexpr (R > 1) f.template operator()<1, 0>();
    if constexpr (R > 1 && B > 1) f.template operator()<1, 1>();
  };
  each([&]<int i, int j>() { tiles.template clear<i, j>(); });
  const auto load_a = [&]<int i>(int64_t k0) {
    const bf16* from = w + i * TILE * w_stride + k0;
    const bool inside = rows >= (i + 1) * TILE && k0 + TILE_K <= k;
    if (inside)
      tiles.template load_a<i>(from, w_stride * sizeof(bf16));
    else
      tiles.template load_a<i>(stage(from, w_stride, rows - i * TILE, k - k0, staging),
                               TILE_K * sizeof(bf16));
  };
  for (int64_t k0 = 0; k0 < k; k0 += TILE_K) {
    if (ahead)
      for (int r = 0; r < R * TILE; ++r) __builtin_prefetch(ahead + r * w_stride + k0, 0, 2);
    tiles.template load_b<0>(x + k0 / 2 * TILE);
    if constexpr (B > 1) tiles.template load_b<1>(x1 + k0 / 2 * TILE);
    load_a.template operator()<0>(k0);
    if constexpr (R > 1) load_a.template operator()<1>(k0);
    each([&]<int i, int j>() { tiles.template multiply<i, j>(); });
  }
  each([&]<int i, int j>() {
    tiles.template store<i, j>(out + i * TILE * width + j * TILE, width * sizeof(float));
  });
}

// The same for at most DENSE_ROWS rows and all tokens of an expert.
inline void dense_rows(Tiles& tiles, const bf16* w, int64_t w_stride, int rows, int64_t k,
                       const Group& group, const float* x, const bf16* next, float* out,
                       int64_t width, bf16* staging) {
  const int64_t k_padded = padded(k);
  for (int b = 0; b < group.num_blocks; b += 2) {
    const bf16* const ahead = b == 0 ? next : nullptr;
    const bool two = b + 1 < group.num_blocks;
    const float* const x0 = x + group.blocks[b].first * k_padded;
    const float* const x1 = two ? x + group.blocks[b + 1].first * k_padded : nullptr;
    const auto tile = rows > TILE ? two ? dense_tile<2, 2> : dense_tile<2, 1>
                                  : (two ? dense_tile<1, 2> : dense_tile<1, 1>);
    tile(tiles, w, w_stride, rows, k, x0, x1, ahead, out + b * TILE, width, staging);
  }
}

inline int64_t dense_width(int64_t pairs) {
  return (pairs + TILE - 1) / TILE * TILE;
}
inline size_t dense_scratch(int64_t pairs) {
  return 2 * DENSE_ROWS * dense_width(pairs) + TILE * TILE_K;
}

inline void gate_up_dense(const FfnShape& s, const ExpertWeights& e, int64_t begin, int64_t end,
                          const Group& group, const float* x, float* h, float* scratch,
                          const void* next) {
  const int64_t width = TILE * group.num_blocks, h_padded = padded(s.intermediate);
  float *const gate = scratch, *const up = gate + DENSE_ROWS * width;
  bf16* const staging = reinterpret_cast<bf16*>(up + DENSE_ROWS * width);
  Tiles tiles;
  for (int64_t r0 = begin; r0 < end; r0 += DENSE_ROWS) {
    const int rows = static_cast<int>(std::min<int64_t>(DENSE_ROWS, end - r0));
    const bf16* const w_gate = static_cast<const bf16*>(e.gate) + r0 * s.gate_stride;
    const bf16* const w_up = w_gate + s.up_offset;
    const bf16* const after = r0 + DENSE_ROWS < end ? w_gate + DENSE_ROWS * s.gate_stride
                                                    : static_cast<const bf16*>(next);
    dense_rows(tiles, w_gate, s.gate_stride, rows, s.hidden, group, x, w_up, gate, width, staging);
    dense_rows(tiles, w_up, s.gate_stride, rows, s.hidden, group, x, after, up, width, staging);
    if (s.bias) {
      const bf16* bias = static_cast<const bf16*>(e.gate_bias) + r0 * s.bias_stride;
      for (int r = 0; r < rows; ++r, bias += s.bias_stride)
        for (int64_t t = 0; t < width; ++t) {
          gate[r * width + t] += to_float(bias[0]);
          up[r * width + t] += to_float(bias[s.bias_up_offset]);
        }
    }
    activate(s.activation, s.alpha, s.limit, gate, up, rows * width);
    const int64_t stop = r0 + rows == s.intermediate ? h_padded : r0 + rows;
    for (int b = 0; b < group.num_blocks; ++b) {
      float* to = h + group.blocks[b].first * h_padded + r0 / 2 * TILE;
      for (int r = 0; r < stop - r0; r += 2, to += TILE) {
        const float* from = gate + r * width + b * TILE;
        uint32_t pairs[TILE] = {};
        for (int t = 0; r < rows && t < TILE; ++t) pairs[t] = round_to_bf16(from[t]);
        for (int t = 0; r + 1 < rows && t < TILE; ++t)
          pairs[t] |= round_to_bf16(from[width + t]) << 16;
        std::memcpy(to, pairs, sizeof(pairs));
      }
    }
  }
}

inline void down_dense(const FfnShape& s, const ExpertWeights& e, int64_t begin, int64_t end,
                       const Group& group, const float* h, const int32_t* token,
                       const float* weight, float* y, int64_t y_stride, float* scratch,
                       const void* next) {
  const int64_t width = TILE * group.num_blocks;
  float* const out = scratch;
  bf16* const staging = reinterpret_cast<bf16*>(out + DENSE_ROWS * width);
  Tiles tiles;
  for (int64_t r0 = begin; r0 < end; r0 += DENSE_ROWS) {
    const int rows = static_cast<int>(std::min<int64_t>(DENSE_ROWS, end - r0));
    const bf16* const w = static_cast<const bf16*>(e.down) + r0 * s.down_stride;
    const bf16* const after = r0 + DENSE_ROWS < end ? w + DENSE_ROWS * s.down_stride
                                                    : static_cast<const bf16*>(next);
    dense_rows(tiles, w, s.down_stride, rows, s.intermediate, group, h, after, out, width, staging);
    float bias[DENSE_ROWS];
    for (int r = 0; r < rows; ++r)
      bias[r] = s.bias ? to_float(static_cast<const bf16*>(e.down_bias)[r0 + r]) : 0;
    for (int b = 0; b < group.num_blocks; ++b)
      for (int n = 0; n < group.blocks[b].count; ++n) {
        const int32_t p = group.blocks[b].first + n;
        const float* from = out + b * TILE + n;
        float* to = y + token[p] * y_stride + (r0 - begin);
        for (int r = 0; r < rows; ++r) to[r] += weight[p] * (from[r * width] + bias[r]);
      }
  }
}
