// Eight floats with AVX2, FMA and F16C; the contract is in simd_portable.h.
inline constexpr int VL = 8;
inline constexpr int ACCUMULATORS = 12;
inline constexpr bool LONG_STREAMS = true;
inline constexpr int STREAM_TOKENS = 6;
inline constexpr int BLOCK_TOKENS = 4;
inline constexpr int PANEL_ROWS = 24;
inline constexpr int DIRECT_ROWS = 3;
inline constexpr int DIRECT_TOKENS = 0;
inline constexpr int BLOCK_K = 1024;
using V = __m256;
typedef int32_t VI __attribute__((vector_size(32)));

inline V load(const float* p) {
  return _mm256_loadu_ps(p);
}
inline void store(float* p, V v) {
  _mm256_storeu_ps(p, v);
}
inline V splat(float s) {
  return _mm256_set1_ps(s);
}
inline V fma(V a, V b, V c) {
  return _mm256_fmadd_ps(a, b, c);
}
inline V vmin(V a, V b) {
  return _mm256_min_ps(a, b);
}
inline V vmax(V a, V b) {
  return _mm256_max_ps(a, b);
}
// As an instruction: from the intrinsic, GCC rotates a full set of accumulators through copies and
// spills, and loads b again for each use.
inline void accumulate(V& sum, V a, V b) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
}

template <int h>
inline V half(const float* p) {
  return load(p + h * VL);
}
// Even weights in half 0, odd ones in half 1: one instruction each, the activations follow suit.
// The mask comes from memory: in a register, it would be one too many beside a tile's 16.
alignas(32) inline constexpr uint32_t ODD[8] = {0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000,
                                                0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000};
template <int h>
inline V half(const bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if constexpr (h == 0) return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  V odd;
  asm("vandps %2, %1, %0" : "=x"(odd) : "x"(bits), "m"(ODD));
  return odd;
}
template <int h>
inline V half(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + h * VL)));
}
template <int h>
inline V half(const i8* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + h * VL))));
}
inline void sum4(V a, V b, V c, V d, float* out) {
  const V s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
