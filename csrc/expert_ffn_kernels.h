// The microkernels behind `ExpertKernels`. Included per ISA inside its namespace, after
// expert_ffn_tile.h, hence no #pragma once. With SPAC_DENSE, experts of many tokens take matrix tiles
// instead of blocks.
#ifdef SPAC_DENSE
inline constexpr int PAD = TILE_K;  // a multiple of STEP
#else
inline constexpr int PAD = STEP;
#endif

inline int64_t padded(int64_t k) {
  return (k + PAD - 1) / PAD * PAD;
}

#ifdef SPAC_DENSE
#include "expert_ffn_dense.h"
inline constexpr int STREAM_MOST = DENSE_TOKENS - 1;
#else
inline constexpr int STREAM_MOST = STREAM_TOKENS;
#endif

// Where element i of a token goes inside a packed block of n tokens, relative to token 0.
template <class W>
inline int64_t packed_index(int64_t i, int64_t n) {
  const int64_t s = i / STEP, j = i % STEP;
  if constexpr (std::is_same_v<W, bf16>)
    return ((2 * s + j % 2) * n) * VL + j / 2;
  else
    return ((2 * s + j / VL) * n) * VL + j % VL;
}

template <class W, class X>
void pack_rows(const X* x, const int32_t* token, int count, int64_t k, float* out) {
#ifdef SPAC_DENSE
  if (count >= DENSE_TOKENS) return pack_dense(x, token, count, k, out);
#endif
  for (int n = 0; n < count; ++n) {
    const X* row = x + token[n] * k;
    float* to = out + n * VL;
    for (int64_t i = 0; i < k; i += STEP, to += 2 * count * VL) {
      X rest[STEP] = {};
      const X* p = row + i;
      if (i + STEP > k) {
        std::memcpy(rest, p, (k - i) * sizeof(X));
        p = rest;
      }
      if constexpr (std::is_same_v<W, bf16> == std::is_same_v<X, bf16>) {
        store(to, half<0>(p));
        store(to + count * VL, half<1>(p));
      } else {
        for (int j = 0; j < STEP; ++j) to[packed_index<W>(j, count)] = to_float(p[j]);
      }
    }
  }
}

template <class W>
void pack(const void* x, DType x_dtype, const int32_t* token, int count, int64_t k, float* out) {
  if (x_dtype == DType::bf16) pack_rows<W>(static_cast<const bf16*>(x), token, count, k, out);
  if (x_dtype == DType::f16) pack_rows<W>(static_cast<const f16*>(x), token, count, k, out);
  if (x_dtype == DType::f32) pack_rows<W>(static_cast<const float*>(x), token, count, k, out);
}

// ---- out[p * out_stride + r] = w[r] . x[p] for the rows of one expert and all its pairs

template <class W>
inline constexpr int STEP_BYTES = STEP * sizeof(W);

// One block of tokens: every row is read once, in halves; what is used next is fetched meanwhile.
template <class W, int N>
void stream_halves(const W* w, int64_t w_stride, int rows, int64_t k, const float* x, const W* next,
                   float* out, int64_t out_stride) {
  constexpr int R = tile_rows(N);
  int r = 0;
  for (; r + R <= rows; r += R) {
    const W* ahead = r + 2 * R <= rows || !next ? w + (r + R) * w_stride : next;
    const int64_t k_half = padded((k + 1) / 2);
    V sums[R * N];
    for (int64_t k0 = 0; k0 < k; k0 += k_half) {
      const W* from = w + r * w_stride + k0;
      const bool last = k0 + k_half >= k;
      row_tile<W, R, N, R, STEP_BYTES<W>>(
          from, w_stride, x + k0 * N, last ? k - k0 : k_half,
          reinterpret_cast<const char*>(last ? ahead : from + k_half), w_stride * sizeof(W),
          reinterpret_cast<float*>(sums), k0 == 0, last, out + r, out_stride);
    }
  }
  for (; r < rows; ++r)
    row_tile<W, 1, N, 0, 0>(w + r * w_stride, w_stride, x, k, nullptr, 0, nullptr, true, true,
                            out + r, out_stride);
}

// One block of tokens, where the ISA has LONG_STREAMS: R streams of `run` consecutive rows each.
// Some way ahead is fetched, in the end where the next streams begin.
template <class W, int N>
void stream_runs(const W* w, int64_t w_stride, int rows, int64_t k, const float* x, const W* next,
                 float* out, int64_t out_stride) {
  constexpr int R = tile_rows(N), AHEAD = 256;
  const int run = rows / R;
  const int64_t stride = run * w_stride;
  for (int r = 0; r < run; ++r) {
    const W* const from = w + r * w_stride;
    const char* const ahead = r + 1 < run || !next ? reinterpret_cast<const char*>(from) + AHEAD
                                                   : reinterpret_cast<const char*>(next);
    float sums[N * R];
    row_tile<W, R, N, R, STEP_BYTES<W>>(from, stride, x, k, ahead, stride * sizeof(W), nullptr,
                                        true, true, sums, R);
    for (int n = 0; n < N; ++n)
      for (int i = 0; i < R; ++i) out[n * out_stride + i * run + r] = sums[n * R + i];
  }
  for (int r = R * run; r < rows; ++r)
    row_tile<W, 1, N, 0, 0>(w + r * w_stride, w_stride, x, k, nullptr, 0, nullptr, true, true,
                            out + r, out_stride);
}

template <class W, int N = STREAM_MOST>
void stream(int tokens, const W* w, int64_t w_stride, int rows, int64_t k, const float* x,
            const W* next, float* out, int64_t out_stride) {
  if constexpr (N > 0) {
    if (tokens == N) {
      if constexpr (LONG_STREAMS)
        return stream_runs<W, N>(w, w_stride, rows, k, x, next, out, out_stride);
      else
        return stream_halves<W, N>(w, w_stride, rows, k, x, next, out, out_stride);
    }
    stream<W, N - 1>(tokens, w, w_stride, rows, k, x, next, out, out_stride);
  }
}

template <class W, int R, int P, int A, int N = BLOCK_TOKENS>
void block_tile(int tokens, const W* w, int64_t w_stride, const float* x, int64_t k,
                const char* ahead, int64_t ahead_stride, float* partial, bool first, bool last,
                float* out, int64_t out_stride) {
  if constexpr (N > 0) {
    if (tokens == N)
      return row_tile<W, R, N, P, A>(w, w_stride, x, k, ahead, ahead_stride, partial, first, last,
                                     out, out_stride);
    block_tile<W, R, P, A, N - 1>(tokens, w, w_stride, x, k, ahead, ahead_stride, partial, first,
                                  last, out, out_stride);
  }
}

// Several blocks of tokens and at most PANEL_ROWS rows, K in slices that stay in the cache. Rows of
// few tokens are converted as they are used; for more, they are first unpacked to a panel of
// floats.
template <class W>
void block_rows(const W* w, int64_t w_stride, int rows, int64_t k, const Group& group,
                const float* x, const W* next, float* out, int64_t out_stride, float* scratch) {
  constexpr int R = 4;
  float* const panel = scratch;
  float* const partial = scratch + PANEL_ROWS * BLOCK_K;
  const bool unpack = group.pairs > DIRECT_TOKENS;
  const int64_t k_padded = padded(k), slices = (k + BLOCK_K - 1) / BLOCK_K;
  const int64_t width = padded((k + slices - 1) / slices);
  const int64_t row_bytes = w_stride * sizeof(W);
  for (int64_t k0 = 0; k0 < k; k0 += width) {
    const int64_t some = k - k0 < width ? k - k0 : width;
    const bool first = k0 == 0, last = k0 + width >= k;
    const char* after = reinterpret_cast<const char*>(last ? next : w + k0 + width);
    const auto tile = [&](int r, int b) {
      const Block block = group.blocks[b];
      const float* xb = x + block.first * k_padded + k0 * block.count;
      float* sums = partial + (block.first * PANEL_ROWS + block.count * r) * VL;
      float* to = out + block.first * out_stride + r;
      const W* from = w + r * w_stride + k0;
      if (unpack) {
        const char* ahead =
            after && b < R ? after + (r + b) * row_bytes : reinterpret_cast<char*>(panel);
        block_tile<float, R, 1, STEP_BYTES<W>>(block.count, panel + r * BLOCK_K, BLOCK_K, xb,
                                               padded(some), ahead, 0, sums, first, last, to,
                                               out_stride);
      } else if (r + R <= rows) {
        const char* ahead =
            r + 2 * R <= rows ? reinterpret_cast<const char*>(from + R * w_stride) : after;
        ahead =
            ahead && 2 * b < R ? ahead + 2 * b * row_bytes : reinterpret_cast<const char*>(from);
        block_tile<W, R, 2, STEP_BYTES<W>>(block.count, from, w_stride, xb, some, ahead, row_bytes,
                                           sums, first, last, to, out_stride);
      } else {
        for (int i = 0; r + i < rows; ++i)
          block_tile<W, 1, 0, 0>(block.count, from + i * w_stride, w_stride, xb, some, nullptr, 0,
                                 sums + block.count * i * VL, first, last, to + i, out_stride);
      }
    };
    if (unpack) {
      for (int r = 0; r < rows; ++r) unpack_row(w + r * w_stride + k0, some, panel + r * BLOCK_K);
      for (int b = 0; b < group.num_blocks; ++b)
        for (int r = 0; r < rows; r += R) tile(r, b);
    } else {
      for (int r = 0; r < rows; r += R)
        for (int b = 0; b < group.num_blocks; ++b) tile(r, b);
    }
  }
}

// The same without a panel, for an ISA whose tiles convert weights at no cost: tiles of DIRECT_ROWS
// rows, and each block of tokens stays in the L1 cache while it meets all rows.
template <class W>
void direct_rows(const W* w, int64_t w_stride, int rows, int64_t k, const Group& group,
                 const float* x, const W* next, float* out, int64_t out_stride, float* partial) {
  constexpr int R = DIRECT_ROWS;
  // Of the rows that come next, each block fetches some: all at once would be waited for.
  const int fetched = group.num_blocks > 2 ? 1 : 2;
  const int64_t k_padded = padded(k), slices = (k + BLOCK_K - 1) / BLOCK_K;
  const int64_t width = padded((k + slices - 1) / slices), row_bytes = w_stride * sizeof(W);
  for (int64_t k0 = 0; k0 < k; k0 += width) {
    const int64_t some = k - k0 < width ? k - k0 : width;
    const bool first = k0 == 0, last = k0 + width >= k;
    const char* const after = reinterpret_cast<const char*>(last ? next : w + k0 + width);
    for (int b = 0; b < group.num_blocks; ++b) {
      const Block block = group.blocks[b];
      const float* const xb = x + block.first * k_padded + k0 * block.count;
      float* sums = partial + block.first * PANEL_ROWS * VL;
      float* const to = out + block.first * out_stride;
      int r = 0;
      for (; r + R <= rows; r += R, sums += block.count * R * VL) {
        const W* const from = w + r * w_stride + k0;
        const char* const ahead = after ? after + (r + b * fetched) * row_bytes : nullptr;
        const auto tile = [&](auto P) {
          block_tile<W, R, P, STEP_BYTES<W>>(block.count, from, w_stride, xb, some, ahead,
                                             row_bytes, sums, first, last, to + r, out_stride);
        };
        if (!after || b * fetched >= R)
          tile(std::integral_constant<int, 0>{});
        else if (fetched == 1)
          tile(std::integral_constant<int, 1>{});
        else
          tile(std::integral_constant<int, 2>{});
      }
      for (; r < rows; ++r, sums += block.count * VL)
        block_tile<W, 1, 0, 0>(block.count, w + r * w_stride + k0, w_stride, xb, some, nullptr, 0,
                               sums, first, last, to + r, out_stride);
    }
  }
}

template <class W>
void rows_dot(const W* w, int64_t w_stride, int rows, int64_t k, const Group& group, const float* x,
              const W* next, float* out, int64_t out_stride, float* scratch) {
  if (group.pairs <= STREAM_MOST)
    return stream<W>(group.pairs, w, w_stride, rows, k, x, next, out, out_stride);
  for (int r = 0; r < rows; r += PANEL_ROWS) {
    const W* from = w + r * w_stride;
    const bool more = rows - r > PANEL_ROWS;
    const W* const then = more ? from + PANEL_ROWS * w_stride : next;
    const int some = more ? PANEL_ROWS : rows - r;
    if constexpr (DIRECT_ROWS > 0)
      direct_rows<W>(from, w_stride, some, k, group, x, then, out + r, out_stride, scratch);
    else
      block_rows<W>(from, w_stride, some, k, group, x, then, out + r, out_stride, scratch);
  }
}

inline size_t dot_scratch(int64_t pairs) {
  return PANEL_ROWS * ((DIRECT_ROWS > 0 ? 0 : BLOCK_K) + pairs * VL);
}
inline int64_t row_stride(int64_t rows) {
  return (rows + VL - 1) / VL * VL;
}

inline size_t scratch(int64_t rows, int64_t pairs) {
  const size_t floats = dot_scratch(pairs) + 2 * row_stride(rows) * pairs;
#ifdef SPAC_DENSE
  return std::max(floats, dense_scratch(pairs));
#else
  return floats;
#endif
}

// ---- projections

inline void scale_rows(const float* scale, int64_t scale_stride, int rows, int pairs, float* out,
                       int64_t out_stride) {
  for (int p = 0; p < pairs; ++p)
    for (int r = 0; r < rows; ++r) out[p * out_stride + r] *= scale[r * scale_stride];
}

template <class W>
float bias_at(const FfnShape& s, const void* bias, int64_t i) {
  if constexpr (sizeof(W) == 1)
    return float_at(bias, s.bias_type, i);
  else
    return to_float(static_cast<const W*>(bias)[i]);
}

// gate = act(gate + bias) * (up + bias) for rows begin.. of all pairs, zero up to `stride`.
template <class W>
void finish_gate_up(const FfnShape& s, const ExpertWeights& e, int64_t begin, int rows, int pairs,
                    float* gate, float* up, int64_t stride) {
  if (s.bias)
    for (int p = 0; p < pairs; ++p)
      for (int j = 0; j < rows; ++j) {
        const int64_t at = (begin + j) * s.bias_stride;
        gate[p * stride + j] += bias_at<W>(s, e.gate_bias, at);
        up[p * stride + j] += bias_at<W>(s, e.gate_bias, at + s.bias_up_offset);
      }
  for (int p = 0; p < pairs; ++p)
    for (int j = rows; j < stride; ++j) gate[p * stride + j] = up[p * stride + j] = 0;
  activate(s.activation, s.alpha, s.limit, gate, up, stride * pairs);
}

// y[token[p]] += weight[p] * (out[p] + bias) for rows begin..; `bias` is scratch.
template <class W>
void finish_down(const FfnShape& s, const ExpertWeights& e, int64_t begin, int rows, int pairs,
                 const float* out, int64_t stride, float* bias, const int32_t* token,
                 const float* weight, float* y, int64_t y_stride) {
  for (int r = 0; r < rows; ++r) bias[r] = s.bias ? bias_at<W>(s, e.down_bias, begin + r) : 0;
  for (int p = 0; p < pairs; ++p) {
    float* to = y + token[p] * y_stride;
    for (int r = 0; r < rows; ++r) to[r] += weight[p] * (out[p * stride + r] + bias[r]);
  }
}

template <class W>
void gate_up(const FfnShape& s, const ExpertWeights& e, int64_t begin, int64_t end,
             const Group& group, const float* x, float* h, float* scratch, const void* next) {
#ifdef SPAC_DENSE
  if (group.pairs >= DENSE_TOKENS)
    return gate_up_dense(s, e, begin, end, group, x, h, scratch, next);
#endif
  const int rows = static_cast<int>(end - begin);
  const int64_t stride = row_stride(rows), h_padded = padded(s.intermediate);
  float* gate = scratch + dot_scratch(group.pairs);
  float* up = gate + stride * group.pairs;
  const W* w_gate = static_cast<const W*>(e.gate) + begin * s.gate_stride;
  const W* w_up = w_gate + s.up_offset;
  rows_dot<W>(w_gate, s.gate_stride, rows, s.hidden, group, x, w_up, gate, stride, scratch);
  rows_dot<W>(w_up, s.gate_stride, rows, s.hidden, group, x, static_cast<const W*>(next), up,
              stride, scratch);
  if constexpr (std::is_same_v<W, i8>) {
    const float* scale = static_cast<const float*>(e.gate_scale) + begin * s.bias_stride;
    scale_rows(scale, s.bias_stride, rows, group.pairs, gate, stride);
    scale_rows(scale + s.bias_up_offset, s.bias_stride, rows, group.pairs, up, stride);
  }
  finish_gate_up<W>(s, e, begin, rows, group.pairs, gate, up, stride);
  const int64_t zero_end = end == s.intermediate ? h_padded : end;
  for (int b = 0; b < group.num_blocks; ++b) {
    const Block block = group.blocks[b];
    for (int n = 0; n < block.count; ++n) {
      const float* from = gate + (block.first + n) * stride - begin;
      float* to = h + block.first * h_padded + n * VL;
      for (int64_t j = begin; j < end; ++j) to[packed_index<W>(j, block.count)] = from[j];
      for (int64_t j = end; j < zero_end; ++j) to[packed_index<W>(j, block.count)] = 0;
    }
  }
}

template <class W>
void down(const FfnShape& s, const ExpertWeights& e, int64_t begin, int64_t end, const Group& group,
          const float* h, const int32_t* token, const float* weight, float* y, int64_t y_stride,
          float* scratch, const void* next) {
#ifdef SPAC_DENSE
  if (group.pairs >= DENSE_TOKENS)
    return down_dense(s, e, begin, end, group, h, token, weight, y, y_stride, scratch, next);
#endif
  const int rows = static_cast<int>(end - begin);
  float* out = scratch + dot_scratch(group.pairs);
  const int64_t stride = row_stride(rows);
  float* bias = out + stride * group.pairs;
  const W* w = static_cast<const W*>(e.down) + begin * s.down_stride;
  rows_dot<W>(w, s.down_stride, rows, s.intermediate, group, h, static_cast<const W*>(next), out,
              stride, scratch);
  if constexpr (std::is_same_v<W, i8>)
    scale_rows(static_cast<const float*>(e.down_scale) + begin, 1, rows, group.pairs, out, stride);
  finish_down<W>(s, e, begin, rows, group.pairs, out, stride, bias, token, weight, y, y_stride);
}

#ifdef SPAC_DENSE
inline constexpr ExpertKernels dense_kernels = {
    STREAM_MOST, TILE,       DENSE_ROWS,    DENSE_FREE, padded,
    false,       pack<bf16>, gate_up<bf16>, down<bf16>, scratch};

const ExpertKernels& expert_kernels(DType weights, DType x) {
  return weights == DType::bf16 ? dense_kernels : avx512::expert_kernels(weights, x);
}
#else
template <class W>
inline constexpr ExpertKernels kernels = {
    STREAM_TOKENS, BLOCK_TOKENS, PANEL_ROWS, 2 * STREAM_TOKENS, padded, false, pack<W>, gate_up<W>,
    down<W>, scratch};
#endif
