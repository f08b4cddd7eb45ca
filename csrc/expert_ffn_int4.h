// The microkernels for int4 weights: integer products, so that a weight costs less than the memory it
// comes from. Tokens are packed to integers of P bytes ("limbs") with one power of two as scale for 8
// consecutive elements: 15 bits beside the largest of them if x is bf16 or fp16 (P = 2), 23 if it is
// fp32 (P = 3), which is what these types hold. Sums of 8 products are exact.
// Included per ISA inside its namespace, after expert_ffn_kernels.h, hence no #pragma once.

// A block of 8 VL weights by its token: P limbs, the highest first, each the elements 2 i of all
// lanes, then the elements 2 i + 1; then -8 * the sum of x and the scale of each lane, because
// weights are stored as q + 8. Lane d has elements 8 d .. 8 d + 7.
inline constexpr int INT4_STEP = 8 * VL;
inline constexpr int INT4_TOKENS = ACCUMULATORS > 12 ? 4 : 3;
template <int P>
struct Int4Block {
  int8_t limbs[P][2][4 * VL];
  int32_t minus[VL];
  float scale[VL];
};
static_assert(sizeof(Int4Block<3>) == sizeof(float) * INT4_STEP);

inline int64_t int4_padded(int64_t k) {
  return (k + INT4_STEP - 1) / INT4_STEP * INT4_STEP;
}

// 8 elements of a token to lane `lane` of its block.
template <int P>
inline void int4_limbs(const float* v, Int4Block<P>& to, int lane) {
  constexpr int32_t MOST = P == 2 ? 127 * 257 : 127 * 65793;
  uint32_t most = 0;
  for (int j = 0; j < 8; ++j) {
    uint32_t bits;
    std::memcpy(&bits, v + j, sizeof(bits));
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  const int32_t exponent = static_cast<int32_t>(most >> 23);  // biased
  int32_t shift = (P == 2 ? 14 : 22) + 127 - exponent;
  float up = 0, down = exponent == 255 ? from_bits(0x7fc00000) : 0;  // NaN and infinity: NaN
  if (exponent > 27 && exponent < 255) {  // else 0: below 2^-100
    if (from_bits(most) * from_bits(static_cast<uint32_t>(shift + 127) << 23) > MOST) --shift;
    up = from_bits(static_cast<uint32_t>(127 + shift) << 23);
    down = from_bits(static_cast<uint32_t>(127 - shift) << 23);
  }
  int32_t x[8], sum = 0;
  for (int j = 0; j < 8; ++j) {
    const float scaled = up == 0 ? 0 : v[j] * up;
    x[j] = static_cast<int32_t>(scaled + (scaled < 0 ? -0.5f : 0.5f));
    sum += x[j];
  }
  for (int limb = P - 1; limb >= 0; --limb)
    for (int j = 0; j < 8; ++j) {
      const int8_t low = static_cast<int8_t>(x[j]);
      to.limbs[limb][j % 2][4 * lane + j / 2] = low;
      x[j] = (x[j] - low) >> 8;
    }
  to.minus[lane] = -8 * sum;
  to.scale[lane] = down;
}

template <int P>
void int4_pack(const void* x, DType x_dtype, const int32_t* token, int count, int64_t k,
               float* out) {
  auto* const blocks = reinterpret_cast<Int4Block<P>*>(out);
  for (int n = 0; n < count; ++n)
    for (int64_t i = 0; i < int4_padded(k); i += 8) {
      float v[8] = {};
      const int64_t at = token[n] * k + i;
      if (i < k) {
        if (x_dtype == DType::f32)
          std::memcpy(v, static_cast<const float*>(x) + at, sizeof(v));
        else
          for (int j = 0; j < 8; ++j) v[j] = float_at(x, x_dtype, at + j);
      }
      int4_limbs<P>(v, blocks[i / INT4_STEP * count + n], static_cast<int>(i % INT4_STEP / 8));
    }
}

// out[n * out_stride + r] = w[r] . x[n] for R rows and N tokens; meanwhile R rows from `ahead` on are
// fetched.
template <int P, int G, int R, int N>
__attribute__((noinline)) void int4_tile(const uint8_t* w, int64_t w_stride, const f16* scale,
                                         int64_t scale_stride, int64_t k, const Int4Block<P>* x,
                                         const uint8_t* ahead, float* out, int64_t out_stride) {
  V acc[N][R] = {};
  const auto block = [&](int r, const uint8_t* from, const f16* row_scale, int64_t b,
                         const Int4Block<P>* xb) {
    const B bytes = load_bytes(from), lows = low(bytes), highs = high(bytes);
    const V s = scales<G>(row_scale, b);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const Int4Block<P>& xn = xb[n];
      VI minus;
      std::memcpy(&minus, xn.minus, sizeof(minus));
      const VI sum = lane_sums<P>(lows, highs, xn.limbs[0][0]) + minus;
      acc[n][r] = fma(__builtin_convertvector(sum, V), s * load(xn.scale), acc[n][r]);
    }
  };
  // Row after row: four of them share a page.
  const int64_t whole = k / INT4_STEP, rest = k - whole * INT4_STEP;
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const uint8_t* const row = w + r * w_stride;
    const f16* const row_scale = scale + r * scale_stride;
    const char* const fetch = reinterpret_cast<const char*>(ahead ? ahead + r * w_stride : row);
    for (int64_t b = 0; b < whole; ++b) {
      __builtin_prefetch(fetch + b * 4 * VL, 0, 3);
      block(r, row + b * 4 * VL, row_scale, b, x + b * N);
    }
    if (rest > 0) {
      uint8_t bytes[4 * VL] = {};
      f16 rest_scale[4] = {};
      std::memcpy(bytes, row + whole * 4 * VL, rest / 2);
      std::memcpy(rest_scale, row_scale + whole * INT4_STEP / G, rest / G * sizeof(f16));
      block(r, bytes, rest_scale, 0, x + whole * N);
    }
  }
  write_sums<R, N>(acc, out, out_stride);
}

template <int P, int G, int R, int N = INT4_TOKENS>
void int4_block(int tokens, const uint8_t* w, int64_t w_stride, const f16* scale,
                int64_t scale_stride, int64_t k, const float* x, const uint8_t* ahead, float* out,
                int64_t out_stride) {
  if constexpr (N > 0) {
    if (tokens == N)
      return int4_tile<P, G, R, N>(w, w_stride, scale, scale_stride, k,
                                   reinterpret_cast<const Int4Block<P>*>(x), ahead, out,
                                   out_stride);
    int4_block<P, G, R, N - 1>(tokens, w, w_stride, scale, scale_stride, k, x, ahead, out,
                               out_stride);
  }
}

template <int P, int G>
void int4_rows(const uint8_t* w, int64_t w_stride, const f16* scale, int64_t scale_stride,
               int rows, int64_t k, const Group& group, const float* x, const uint8_t* next,
               float* out, int64_t out_stride) {
  constexpr int R = 4;
  const int64_t k_padded = int4_padded(k);
  for (int r = 0; r < rows;) {
    const uint8_t* const from = w + r * w_stride;
    const int taken = rows - r >= R ? R : 1;
    for (int b = 0; b < group.num_blocks; ++b) {
      const Block block = group.blocks[b];
      const float* const xb = x + block.first * k_padded;
      float* const to = out + block.first * out_stride + r;
      const uint8_t* const ahead = b > 0 ? nullptr : rows - r >= 2 * R ? from + R * w_stride : next;
      if (taken == R)
        int4_block<P, G, R>(block.count, from, w_stride, scale + r * scale_stride, scale_stride, k,
                            xb, ahead, to, out_stride);
      else
        int4_block<P, G, 1>(block.count, from, w_stride, scale + r * scale_stride, scale_stride, k,
                            xb, nullptr, to, out_stride);
    }
    r += taken;
  }
}

template <int P, int G>
void int4_gate_up(const FfnShape& s, const ExpertWeights& e, int64_t begin, int64_t end,
                  const Group& group, const float* x, float* h, float* scratch, const void* next) {
  const int rows = static_cast<int>(end - begin);
  const int64_t stride = row_stride(rows), h_padded = int4_padded(s.intermediate);
  float* const gate = scratch;
  float* const up = gate + stride * group.pairs;
  const uint8_t* const w_gate = static_cast<const uint8_t*>(e.gate) + begin * s.gate_stride;
  const uint8_t* const w_up = w_gate + s.up_offset;
  const int64_t row_scales = s.hidden / G, scale_stride = s.bias_stride * row_scales;
  const f16* const scale = static_cast<const f16*>(e.gate_scale) + begin * scale_stride;
  int4_rows<P, G>(w_gate, s.gate_stride, scale, scale_stride, rows, s.hidden, group, x, w_up, gate,
                  stride);
  int4_rows<P, G>(w_up, s.gate_stride, scale + s.bias_up_offset * row_scales, scale_stride, rows,
                  s.hidden, group, x, static_cast<const uint8_t*>(next), up, stride);
  finish_gate_up<i4>(s, e, begin, rows, group.pairs, gate, up, stride);
  // begin is a multiple of 8, and so is a block's number of lanes times 8.
  const int64_t zero_end = end == s.intermediate ? h_padded : end;
  for (int b = 0; b < group.num_blocks; ++b) {
    const Block block = group.blocks[b];
    auto* const blocks = reinterpret_cast<Int4Block<P>*>(h + block.first * h_padded);
    for (int n = 0; n < block.count; ++n)
      for (int64_t j = begin; j < zero_end; j += 8) {
        const float zeros[8] = {};
        const float* from = j < end ? gate + (block.first + n) * stride + j - begin : zeros;
        int4_limbs<P>(from, blocks[j / INT4_STEP * block.count + n],
                      static_cast<int>(j % INT4_STEP / 8));
      }
  }
}

template <int P, int G>
void int4_down(const FfnShape& s, const ExpertWeights& e, int64_t begin, int64_t end,
               const Group& group, const float* h, const int32_t* token, const float* weight,
               float* y, int64_t y_stride, float* scratch, const void* next) {
  const int rows = static_cast<int>(end - begin);
  const int64_t stride = row_stride(rows), row_scales = s.intermediate / G;
  int4_rows<P, G>(static_cast<const uint8_t*>(e.down) + begin * s.down_stride, s.down_stride,
                  static_cast<const f16*>(e.down_scale) + begin * row_scales, row_scales, rows,
                  s.intermediate, group, h, static_cast<const uint8_t*>(next), scratch, stride);
  finish_down<i4>(s, e, begin, rows, group.pairs, scratch, stride, scratch + stride * group.pairs,
                  token, weight, y, y_stride);
}

template <int P, int G>
inline constexpr ExpertKernels int4_kernels = {
    INT4_TOKENS, INT4_TOKENS, 16, INT4_TOKENS, int4_padded, false, int4_pack<P>, int4_gate_up<P, G>,
    int4_down<P, G>, scratch};

inline const ExpertKernels& int4_kernels_for(DType weights, DType x) {
  const bool wide = x == DType::f32;
  if (weights == DType::i4_32) return wide ? int4_kernels<3, 32> : int4_kernels<2, 32>;
  return wide ? int4_kernels<3, 128> : int4_kernels<2, 128>;
}

#ifdef SPAC_VNNI
const ExpertKernels& expert_kernels(DType weights, DType x) {
  return int4_kernels_for(weights, x);
}
#else
const ExpertKernels& expert_kernels(DType weights, DType x) {
  if (weights == DType::i4_32 || weights == DType::i4_128) return int4_kernels_for(weights, x);
  if (weights == DType::i8) return kernels<i8>;
  if (weights == DType::bf16) return kernels<bf16>;
  if (weights == DType::f16) return kernels<f16>;
  return kernels<float>;
}
#endif
