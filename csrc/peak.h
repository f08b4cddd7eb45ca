// What this CPU can do at best, for the benchmark: reading memory and multiplying. Included per ISA
// inside its namespace, after simd_<isa>.h, hence no #pragma once.

// Reads n bytes in eight streams as the kernels do: as long as can be, since some hardware's prefetch
// needs some KB to get going, or a page apart. A rest of less than eight pages is left out.
inline uint64_t read_memory(const char* data, size_t n) {
  constexpr size_t PAGE = 4096, STREAMS = 8;
  const size_t length = LONG_STREAMS ? n / STREAMS / 64 * 64 : PAGE;
  VI seen[STREAMS] = {};
  for (size_t at = 0; length && at + STREAMS * length <= n; at += STREAMS * length)
    for (size_t i = at; i < at + length; i += sizeof(VI))
#pragma GCC unroll 8
      for (size_t s = 0; s < STREAMS; ++s) {
        VI v;
        std::memcpy(&v, data + i + s * length, sizeof(v));
        seen[s] ^= v;
      }
  uint64_t sum = 0;
  for (const VI& v : seen)
    for (int i = 0; i < VL; ++i) sum += static_cast<uint32_t>(v[i]);
  return sum;
}

// `steps` times 12 independent multiply-adds of VL floats; returns a value that depends on them.
inline float multiply_add(int64_t steps) {
  V sums[12];  // of different values, or the compiler computes one of them
#pragma GCC unroll 12
  for (int i = 0; i < 12; ++i) sums[i] = splat(static_cast<float>(i));
  const V factor = splat(0.5f);
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) sums[i] = fma(sums[i], factor, factor);
  }
  V total = {};
#pragma GCC unroll 12
  for (int i = 0; i < 12; ++i) total += sums[i];
  return total[0];
}

const CpuPeak& cpu_peak() {
  static constexpr CpuPeak peak = {read_memory, multiply_add, 12 * 2 * VL};
  return peak;
}
