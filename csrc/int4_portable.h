// Bytes of two int4 weights in plain C++; what the other ISAs imitate. Every ISA header provides:
//   B            4 VL bytes: 8 VL weights, those of a lane are 4 bytes
//   low, high    the weights 2 i, and the weights 2 i + 1, as bytes 0..15
//   scales<G>    the scale of each lane of block b of a row, in groups of G weights
//   lane_sums<P> per lane, the sum of weight * x over x's P limbs (int4_limbs in expert_ffn_int4.h)
// Included inside a namespace, hence no #pragma once.
typedef uint8_t B __attribute__((vector_size(4 * VL)));

inline B load_bytes(const void* p) {
  B v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline B low(B v) {
  return v & 15;
}
inline B high(B v) {
  return v >> 4;
}
template <int G>
inline V scales(const f16* p, int64_t b) {
  return splat(to_float(p[b * 8 * VL / G]));
}
template <int P>
inline VI lane_sums(B low, B high, const int8_t* x) {
  VI sum{};
  for (int limb = 0; limb < P; ++limb, x += 8 * VL)
    for (int lane = 0; lane < VL; ++lane) {
      int32_t dot = 0;
      for (int i = 4 * lane; i < 4 * lane + 4; ++i) dot += low[i] * x[i] + high[i] * x[4 * VL + i];
      sum[lane] = sum[lane] * 256 + dot;
    }
  return sum;
}
