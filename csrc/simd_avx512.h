// Sixteen floats with AVX-512 F, BW, DQ and VL; the contract is in simd_portable.h.
inline constexpr int VL = 16;
inline constexpr int ACCUMULATORS = 24;
inline constexpr bool LONG_STREAMS = false;
inline constexpr int STREAM_TOKENS = 6;
inline constexpr int BLOCK_TOKENS = 6;
inline constexpr int PANEL_ROWS = 8;
inline constexpr int DIRECT_ROWS = 0;
inline constexpr int DIRECT_TOKENS = 32;
inline constexpr int BLOCK_K = 768;
using V = __m512;
typedef int32_t VI __attribute__((vector_size(64)));

inline V load(const float* p) {
  return _mm512_loadu_ps(p);
}
inline void store(float* p, V v) {
  _mm512_storeu_ps(p, v);
}
inline V splat(float s) {
  return _mm512_set1_ps(s);
}
inline V fma(V a, V b, V c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline V vmin(V a, V b) {
  return _mm512_min_ps(a, b);
}
inline V vmax(V a, V b) {
  return _mm512_max_ps(a, b);
}
// As an instruction: from the intrinsic, GCC rotates a full set of accumulators through copies and
// spills, and loads b again for each use.
inline void accumulate(V& sum, V a, V b) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

template <int h>
inline V half(const float* p) {
  return load(p + h * VL);
}
template <int h>
inline V half(const bf16* p) {
  const __m512i bits = _mm512_loadu_si512(p);
  return _mm512_castsi512_ps(h == 0 ? _mm512_slli_epi32(bits, 16)
                                    : _mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000)));
}
template <int h>
inline V half(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + h * VL)));
}
template <int h>
inline V half(const i8* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + h * VL))));
}
inline void sum4(V a, V b, V c, V d, float* out) {
  // [a.lo + a.hi | b.lo + b.hi], then one 128-bit lane per argument, then inside the lanes.
  const V ab = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
  const V cd = _mm512_shuffle_f32x4(c, d, 0x44) + _mm512_shuffle_f32x4(c, d, 0xee);
  V s = _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd);
  s = s + _mm512_permute_ps(s, 0x4e);
  s = s + _mm512_permute_ps(s, 0xb1);
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, s)));
}
