// The microkernels for int8 and int4 weights where one instruction multiplies 16 bits and adds two
// products (AVX2): weights are widened to 16 bits, tokens are packed, in blocks of 256 elements, to
// integers of 15 bits and a sign beside the largest of the block: they are off by at most 2^-15 of
// it. An fp32 token is two such planes, the second what the first leaves. A block's sums are exact.
// Included after expert_ffn_kernels.h, hence no #pragma once.
inline constexpr int INT_BLOCK = 256;
inline constexpr int INT_PLANES = 4;     // of tokens, in a tile
inline constexpr int INT_ROWS = 4;       // of weights, in a tile: streams from memory
inline constexpr int INT_TOGETHER = 16;  // rows that several blocks of tokens share in the cache

struct IntBlock {
  int16_t x[INT_BLOCK];  // in the order in which the weights are widened
  float minus[VL];  // int4: -8 times the sums of 32 elements, for weights are stored as q + 8
  float scale;
  float unused[VL - 1];
};

template <int P>
int64_t int_packed(int64_t k) {
  return (k + INT_BLOCK - 1) / INT_BLOCK * (P * sizeof(IntBlock) / sizeof(float));
}

inline __m256i load_int(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
// sum += w * x, as instructions: GCC adds all the products of a block in a tree, and spills them.
inline void dot(__m256i& sum, __m256i w, const int16_t* x) {
  __m256i product;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
      : "+x"(sum), "=&x"(product)
      : "x"(w), "m"(*reinterpret_cast<const __m256i_u*>(x)));
}

// a and b are 32 consecutive integers: the even ones to a, the odd ones to b.
inline void part_even_and_odd(__m256i& a, __m256i& b) {
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1,
                                         4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  const __m256i low = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(a, order), 0xd8);
  const __m256i high = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(b, order), 0xd8);
  a = _mm256_permute2x128_si256(low, high, 0x20);
  b = _mm256_permute2x128_si256(low, high, 0x31);
}

// The sums of four vectors of integers, as floats.
inline __m128 int_sum4(const __m256i (&v)[4]) {
  const __m256i s = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
  return _mm_cvtepi32_ps(
      _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1)));
}

// A vector of 32 bytes: even weights, then odd ones.
struct Int8 {
  using Scale = float;  // of a row
  static constexpr int BYTES = INT_BLOCK, SCALES = 0;
  static int64_t row_scales(int64_t) { return 1; }

  static void arrange(__m256i (&x)[INT_BLOCK / 16], IntBlock&) {
    for (int i = 0; i < INT_BLOCK / 16; i += 2) part_even_and_odd(x[i], x[i + 1]);
  }

  template <int N>
  static void block(const uint8_t* w, const float*, const IntBlock* x, V (&acc)[N]) {
    __m256i sum[N] = {};
    for (int i = 0; i < INT_BLOCK; i += 32) {
      const __m256i v = load_int(w + i);
      const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8);
      const __m256i odd = _mm256_srai_epi16(v, 8);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        dot(sum[n], even, x[n].x + i);
        dot(sum[n], odd, x[n].x + i + 16);
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      acc[n] = fma(_mm256_cvtepi32_ps(sum[n]), splat(x[n].scale), acc[n]);
  }
};

// A vector of 32 bytes is 64 weights: of every four, the first ones, the second ones, and so on.
template <int G>
struct Int4 {
  using Scale = f16;
  static constexpr int BYTES = INT_BLOCK / 2, SCALES = INT_BLOCK / G;
  static int64_t row_scales(int64_t k) { return k / G; }

  static void arrange(__m256i (&x)[INT_BLOCK / 16], IntBlock& to) {
    const auto sum = [&](int part) {
      const __m256i minus = _mm256_set1_epi16(-8);
      return _mm256_add_epi32(_mm256_madd_epi16(minus, x[2 * part]),
                              _mm256_madd_epi16(minus, x[2 * part + 1]));
    };
    for (int odd = 0; odd < 2; ++odd)
      _mm_storeu_ps(to.minus + 4 * odd,
                    int_sum4({sum(odd), sum(odd + 2), sum(odd + 4), sum(odd + 6)}));
    for (int i = 0; i < INT_BLOCK / 16; i += 4) {
      part_even_and_odd(x[i], x[i + 1]);
      part_even_and_odd(x[i + 2], x[i + 3]);
      part_even_and_odd(x[i], x[i + 2]);
      part_even_and_odd(x[i + 1], x[i + 3]);
    }
  }

  // The scales of a block's eight parts of 32: those of even parts, then those of odd ones.
  static V scales(const f16* p) {
    if constexpr (G == 32) {
      const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
      const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      return _mm256_cvtph_ps(_mm_shuffle_epi8(all, order));
    }
    int32_t two;
    std::memcpy(&two, p, sizeof(two));
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_cvtph_ps(_mm_cvtsi32_si128(two))),
                                    _mm256_setr_epi32(0, 0, 1, 1, 0, 0, 1, 1));
  }

  template <int N>
  static void block(const uint8_t* w, const f16* scale, const IntBlock* x, V (&acc)[N]) {
    const V all = scales(scale);
    V sums[N];
    __m256i sum[N];
    constexpr int PARTS = G == 128 ? 2 : 1;  // of 64 weights under the same scales
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sums[n] = all * load(x[n].minus);
    const auto part = [&](auto index) {
      constexpr int i = index;
      const V s = _mm256_permute_ps(all, i * 0x55);
      const __m256i v = load_int(w + 32 * i), ones = _mm256_set1_epi16(15);
      const __m256i q[4] = {v & ones, _mm256_srli_epi16(v, 4) & ones,
                            _mm256_srli_epi16(v, 8) & ones, _mm256_srli_epi16(v, 12)};
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const int16_t* const xn = x[n].x + 64 * i;
        if (i % PARTS == 0)
          sum[n] = _mm256_madd_epi16(q[0], load_int(xn));
        else
          dot(sum[n], q[0], xn);
        for (int j = 1; j < 4; ++j) dot(sum[n], q[j], xn + 16 * j);
        if ((i + 1) % PARTS == 0) sums[n] = fma(_mm256_cvtepi32_ps(sum[n]), s, sums[n]);
      }
    };
    part(std::integral_constant<int, 0>{}), part(std::integral_constant<int, 1>{});
    part(std::integral_constant<int, 2>{}), part(std::integral_constant<int, 3>{});
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[n] = fma(sums[n], splat(x[n].scale), acc[n]);
  }
};

// ---- tokens

// The power of two that brings elements of at most `most` (its bits) to 15 bits; NaN if they are
// not finite, 0 if they are below 2^-95.
inline float int_scale(uint32_t most) {
  const uint32_t exponent = most >> 23;
  if (exponent == 255) return from_bits(0x7fc00000);
  return exponent < 32 ? 0 : from_bits((exponent - 14) << 23);
}

// A block of a token to P planes.
template <class Q, int P>
void int_pack_block(const float* v, IntBlock* to) {
  __m256i mosts{};
  for (int i = 0; i < INT_BLOCK; i += VL)
    mosts = _mm256_max_epi32(mosts, load_int(v + i) & _mm256_set1_epi32(0x7fffffff));
  uint32_t most[VL];
  std::memcpy(most, &mosts, sizeof(most));
  float scale = int_scale(*std::max_element(most, most + VL));
  const V up = splat(scale > 0 ? 1 / scale : 0);
  __m256i x[P][INT_BLOCK / 16];
  for (int i = 0; i < INT_BLOCK; i += 16) {
    V a = load(v + i) * up, b = load(v + i + VL) * up;
    for (int p = 0; p < P; ++p) {
      const __m256i ia = _mm256_cvtps_epi32(a), ib = _mm256_cvtps_epi32(b);
      x[p][i / 16] = _mm256_permute4x64_epi64(_mm256_packs_epi32(ia, ib), 0xd8);
      a = (a - _mm256_cvtepi32_ps(ia)) * splat(0x1p15f);
      b = (b - _mm256_cvtepi32_ps(ib)) * splat(0x1p15f);
    }
  }
  for (int p = 0; p < P; ++p, ++to, scale *= 0x1p-15f) {
    to->scale = scale;
    Q::arrange(x[p], *to);
    std::memcpy(to->x, x[p], sizeof(to->x));
  }
}

inline V eight(const float* p) {
  return load(p);
}
inline V eight(const f16* p) {
  return half<0>(p);
}
inline V eight(const bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

template <class Q, int P>
void int_pack(const void* x, DType x_dtype, const int32_t* token, int count, int64_t k,
              float* out) {
  auto* to = reinterpret_cast<IntBlock*>(out);
  for (int64_t i = 0; i < k; i += INT_BLOCK)
    for (int n = 0; n < count; ++n, to += P) {
      float v[INT_BLOCK] = {};
      const int some = static_cast<int>(std::min<int64_t>(INT_BLOCK, k - i));
      const auto copy = [&](const auto* row) {
        int j = 0;
        for (; j + VL <= some; j += VL) store(v + j, eight(row + j));
        for (; j < some; ++j) v[j] = to_float(row[j]);
      };
      const int64_t at = token[n] * k + i;
      if (x_dtype == DType::bf16) copy(static_cast<const bf16*>(x) + at);
      if (x_dtype == DType::f16) copy(static_cast<const f16*>(x) + at);
      if (x_dtype == DType::f32) copy(static_cast<const float*>(x) + at);
      int_pack_block<Q, P>(v, to);
    }
}

// ---- out[n * out_stride + r * out_step] = w[r] . x[n] for R rows and N tokens of P planes

// Meanwhile R rows from `ahead` on are fetched.
template <class Q, int P, int R, int N>
__attribute__((noinline)) void int_tile(const uint8_t* w, int64_t w_stride,
                                        const typename Q::Scale* scale, int64_t scale_stride,
                                        int64_t k, const IntBlock* x, const char* ahead, float* out,
                                        int64_t out_stride, int64_t out_step) {
  constexpr int M = N * P;
  V acc[R][M];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)  // not = {}, which GCC makes a slow string instruction
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) acc[r][m] = V{};
  const int64_t whole = k / INT_BLOCK, rest = k - whole * INT_BLOCK;
  for (int64_t b = 0; b < whole; ++b, x += M, ahead += Q::BYTES, scale += Q::SCALES) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      for (int line = 0; line < Q::BYTES; line += 64)
        __builtin_prefetch(ahead + r * w_stride + line, 0, 3);
      Q::template block<M>(w + r * w_stride + b * Q::BYTES, scale + r * scale_stride, x, acc[r]);
    }
  }
  if (rest > 0) {
    for (int r = 0; r < R; ++r) {
      uint8_t bytes[Q::BYTES] = {};
      typename Q::Scale scales[Q::SCALES + 1] = {};
      std::memcpy(bytes, w + r * w_stride + whole * Q::BYTES, rest * Q::BYTES / INT_BLOCK);
      std::memcpy(scales, scale + r * scale_stride,
                  rest * Q::SCALES / INT_BLOCK * sizeof(typename Q::Scale));
      Q::template block<M>(bytes, scales, x, acc[r]);
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const auto sum = [&](int r) {
      if (r >= R) return V{};
      return P == 1 ? acc[r][n] : acc[r][n * P] + acc[r][n * P + 1];
    };
    float four[4];
    sum4(sum(0), sum(1), sum(2), sum(3), four);
    for (int r = 0; r < R; ++r) out[n * out_stride + r * out_step] = four[r];
  }
}

template <class Q, int P, int R, int N = INT_PLANES / P, class... Rest>
void int_block(int tokens, Rest... rest) {
  if constexpr (N > 0) {
    if (tokens == N) return int_tile<Q, P, R, N>(rest...);
    int_block<Q, P, R, N - 1>(tokens, rest...);
  }
}

// As in stream_runs, INT_ROWS streams; with several blocks of tokens, INT_TOGETHER rows stay in the
// cache for all of them.
template <class Q, int P>
void int_rows(const uint8_t* w, int64_t w_stride, const typename Q::Scale* scale,
              int64_t scale_stride, int rows, int64_t k, const Group& group, const float* x,
              const void* next, float* out, int64_t out_stride) {
  constexpr int AHEAD = 256;
  const int64_t k_packed = int_packed<P>(k);
  const int together = group.num_blocks > 1 ? INT_TOGETHER : rows;
  for (int first = 0; first < rows; first += together) {
    const int some = std::min(together, rows - first), run = some / INT_ROWS;
    const void* const then = first + some < rows ? w + (first + some) * w_stride : next;
    for (int b = 0; b < group.num_blocks; ++b) {
      const Block block = group.blocks[b];
      const auto* const xb = reinterpret_cast<const IntBlock*>(x + block.first * k_packed);
      const auto tile = [&](auto R, int r, int step, bool last) {
        const uint8_t* const from = w + r * w_stride;
        const void* const ahead = last && then && b == 0 ? then : from + AHEAD;
        int_block<Q, P, R>(block.count, from, step * w_stride, scale + r * scale_stride,
                           step * scale_stride, k, xb, static_cast<const char*>(ahead),
                           out + block.first * out_stride + r, out_stride, step);
      };
      for (int r = 0; r < run; ++r)
        tile(std::integral_constant<int, INT_ROWS>{}, first + r, run, r + 1 == run);
      for (int r = run * INT_ROWS; r < some; ++r)
        tile(std::integral_constant<int, 1>{}, first + r, 1, false);
    }
  }
}

// ---- projections

template <class Q, int P>
void int_gate_up(const FfnShape& s, const ExpertWeights& e, int64_t begin, int64_t end,
                 const Group& group, const float* x, float* h, float* scratch, const void* next) {
  using Scale = typename Q::Scale;
  const int rows = static_cast<int>(end - begin);
  const int64_t stride = row_stride(rows), row_scales = Q::row_scales(s.hidden);
  float* const gate = scratch;
  float* const up = gate + stride * group.pairs;
  const uint8_t* const w_gate = static_cast<const uint8_t*>(e.gate) + begin * s.gate_stride;
  const uint8_t* const w_up = w_gate + s.up_offset;
  const int64_t scale_stride = s.bias_stride * row_scales;
  const Scale* const scale = static_cast<const Scale*>(e.gate_scale) + begin * scale_stride;
  const Scale* const scale_up = scale + s.bias_up_offset * row_scales;
  int_rows<Q, P>(w_gate, s.gate_stride, scale, scale_stride, rows, s.hidden, group, x, w_up, gate,
                 stride);
  int_rows<Q, P>(w_up, s.gate_stride, scale_up, scale_stride, rows, s.hidden, group, x, next, up,
                 stride);
  if constexpr (std::is_same_v<Q, Int8>) {
    scale_rows(scale, scale_stride, rows, group.pairs, gate, stride);
    scale_rows(scale_up, scale_stride, rows, group.pairs, up, stride);
  }
  finish_gate_up<i8>(s, e, begin, rows, group.pairs, gate, up, stride);
  for (int p = 0; p < group.pairs; ++p)
    std::copy_n(gate + p * stride, rows, h + p * s.intermediate + begin);
}

template <class Q, int P>
void int_down(const FfnShape& s, const ExpertWeights& e, int64_t begin, int64_t end,
              const Group& group, const float* h, const int32_t* token, const float* weight,
              float* y, int64_t y_stride, float* scratch, const void* next) {
  using Scale = typename Q::Scale;
  const int rows = static_cast<int>(end - begin);
  const int64_t stride = row_stride(rows), row_scales = Q::row_scales(s.intermediate);
  const Scale* const scale = static_cast<const Scale*>(e.down_scale) + begin * row_scales;
  int_rows<Q, P>(static_cast<const uint8_t*>(e.down) + begin * s.down_stride, s.down_stride, scale,
                 row_scales, rows, s.intermediate, group, h, next, scratch, stride);
  if constexpr (std::is_same_v<Q, Int8>) scale_rows(scale, 1, rows, group.pairs, scratch, stride);
  finish_down<i8>(s, e, begin, rows, group.pairs, scratch, stride, scratch + stride * group.pairs,
                  token, weight, y, y_stride);
}

template <class Q, int P>
inline constexpr ExpertKernels int_kernels = {
    INT_PLANES / P, INT_PLANES / P, 16, 3, int_packed<P>, true, int_pack<Q, P>, int_gate_up<Q, P>,
    int_down<Q, P>, scratch};

const ExpertKernels& expert_kernels(DType weights, DType x) {
  const bool wide = x == DType::f32;
  if (weights == DType::i8) return wide ? int_kernels<Int8, 2> : int_kernels<Int8, 1>;
  if (weights == DType::i4_32) return wide ? int_kernels<Int4<32>, 2> : int_kernels<Int4<32>, 1>;
  if (weights == DType::i4_128) return wide ? int_kernels<Int4<128>, 2> : int_kernels<Int4<128>, 1>;
  if (weights == DType::bf16) return kernels<bf16>;
  if (weights == DType::f16) return kernels<f16>;
  return kernels<float>;
}
