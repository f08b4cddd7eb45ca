// Bytes of two int4 weights with AVX2; the contract is in int4_portable.h.
using B = __m256i;

inline B load_bytes(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline B low(B v) {
  return _mm256_and_si256(v, _mm256_set1_epi8(15));
}
inline B high(B v) {
  return _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15));
}
template <int G>
inline V scales(const f16* p, int64_t b) {
  if constexpr (G == 32) {
    int32_t two;
    std::memcpy(&two, p + 2 * b, sizeof(two));
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_cvtph_ps(_mm_cvtsi32_si128(two))),
                                    _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
  }
  return _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(p[b / 2].bits)));
}
// Sums of two products are at most 15 * 128 * 2, of four twice that: they fit 16 bits.
template <int P>
inline VI lane_sums(B low, B high, const int8_t* x) {
  const auto limb = [&](int i) {
    const B a = load_bytes(x + 2 * i * sizeof(B)), b = load_bytes(x + (2 * i + 1) * sizeof(B));
    return _mm256_add_epi16(_mm256_maddubs_epi16(low, a), _mm256_maddubs_epi16(high, b));
  };
  B sum = _mm256_add_epi32(_mm256_madd_epi16(limb(P - 2), _mm256_set1_epi16(256)),
                           _mm256_madd_epi16(limb(P - 1), _mm256_set1_epi16(1)));
  if constexpr (P == 3)
    sum = _mm256_add_epi32(
        sum, _mm256_slli_epi32(_mm256_madd_epi16(limb(0), _mm256_set1_epi16(1)), 16));
  return (VI)sum;
}
