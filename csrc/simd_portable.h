// Four floats in plain C++ vector extensions: runs on any CPU, and is what the other ISAs imitate.
// Included inside a namespace, hence no #pragma once. Every ISA header provides:
//   V, VI            a vector of VL floats, of VL int32
//   ACCUMULATORS     registers that a tile may use for sums
//   LONG_STREAMS     few tokens: four streams of whole rows, not up to eight of halves
//   STREAM_TOKENS    widest token block that reads weight rows as they lie
//   BLOCK_TOKENS     tokens per block for more, with PANEL_ROWS rows (a multiple of 4) together
//   DIRECT_ROWS      rows of a tile of direct_rows, which divide PANEL_ROWS; 0: block_rows, whose
//                    rows are unpacked beyond DIRECT_TOKENS tokens
//   BLOCK_K          columns of a slice, so that a block and some rows fit the L1 cache
//   accumulate       sum += a * b, where sums must stay in registers
//   fma, vmin, vmax  vmin(a, b) and vmax(a, b) return b if either is NaN
//   half<h>(p)       vector h (0 or 1) of the 2 VL weights at p, as floats, in packed order
//   sum4             out[i] = sum of the lanes of the i-th argument, in one fixed order
inline constexpr int VL = 4;
inline constexpr int ACCUMULATORS = 12;
inline constexpr bool LONG_STREAMS = false;
inline constexpr int STREAM_TOKENS = 3;
inline constexpr int BLOCK_TOKENS = 3;
inline constexpr int PANEL_ROWS = 8;
inline constexpr int DIRECT_ROWS = 0;
inline constexpr int DIRECT_TOKENS = 12;
inline constexpr int BLOCK_K = 256;
typedef float V __attribute__((vector_size(16)));
typedef int32_t VI __attribute__((vector_size(16)));

inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(float* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}
inline V splat(float s) {
  return V{s, s, s, s};
}
inline V fma(V a, V b, V c) {
  return a * b + c;
}
inline V vmin(V a, V b) {
  return a < b ? a : b;
}
inline V vmax(V a, V b) {
  return a > b ? a : b;
}
inline void accumulate(V& sum, V a, V b) {
  sum += a * b;
}

template <int h>
inline V half(const float* p) {
  return load(p + h * VL);
}
template <int h>
inline V half(const bf16* p) {
  VI bits;
  std::memcpy(&bits, p, sizeof(bits));
  bits = h == 0 ? bits << 16 : bits & static_cast<int32_t>(0xffff0000);
  return (V)bits;
}
template <int h>
inline V half(const f16* p) {
  V v;
  for (int i = 0; i < VL; ++i) v[i] = to_float(p[h * VL + i]);
  return v;
}
template <int h>
inline V half(const i8* p) {
  V v;
  for (int i = 0; i < VL; ++i) v[i] = to_float(p[h * VL + i]);
  return v;
}
inline void sum4(V a, V b, V c, V d, float* out) {
  const V v[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) out[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
}
