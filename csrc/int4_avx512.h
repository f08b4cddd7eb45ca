// Bytes of two int4 weights with AVX-512; the contract is in int4_portable.h.
using B = __m512i;

inline B load_bytes(const void* p) {
  return _mm512_loadu_si512(p);
}
inline B low(B v) {
  return _mm512_and_si512(v, _mm512_set1_epi8(15));
}
inline B high(B v) {
  return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15));
}
template <int G>
inline V scales(const f16* p, int64_t b) {
  if constexpr (G == 32) {
    const __m128 four =
        _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 4 * b)));
    return _mm512_permutexvar_ps(
        _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
        _mm512_castps128_ps512(four));
  }
  return _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(p[b].bits)));
}
#ifdef SPAC_VNNI
template <int P>
inline VI lane_sums(B low, B high, const int8_t* x) {
  B sum = _mm512_setzero_si512();
#pragma GCC unroll 3
  for (int i = 0; i < P; ++i) {
    if (i) sum = _mm512_slli_epi32(sum, 8);
    sum = _mm512_dpbusd_epi32(sum, low, load_bytes(x + 2 * i * sizeof(B)));
    sum = _mm512_dpbusd_epi32(sum, high, load_bytes(x + (2 * i + 1) * sizeof(B)));
  }
  return (VI)sum;
}
#else
// Sums of two products are at most 15 * 128 * 2, of four twice that: they fit 16 bits.
template <int P>
inline VI lane_sums(B low, B high, const int8_t* x) {
  const auto limb = [&](int i) {
    const B a = load_bytes(x + 2 * i * sizeof(B)), b = load_bytes(x + (2 * i + 1) * sizeof(B));
    return _mm512_add_epi16(_mm512_maddubs_epi16(low, a), _mm512_maddubs_epi16(high, b));
  };
  B sum = _mm512_add_epi32(_mm512_madd_epi16(limb(P - 2), _mm512_set1_epi16(256)),
                           _mm512_madd_epi16(limb(P - 1), _mm512_set1_epi16(1)));
  if constexpr (P == 3)
    sum = _mm512_add_epi32(
        sum, _mm512_slli_epi32(_mm512_madd_epi16(limb(0), _mm512_set1_epi16(1)), 16));
  return (VI)sum;
}
#endif
