// Matrix tiles of 16 weight rows and 16 tokens, C[i][j] += A[i] B[j] for i, j in 0..1:
//   A  [16 rows][32] bf16, from memory as weights lie there
//   B  [32 / 2][16 tokens][2] bf16, 1024 bytes in a row
//   C  [16 rows][16 tokens] fp32
// AMX flushes subnormal numbers to zero. SPAC_EMULATE_AMX gives the same in plain C++, so that the
// code around the tiles can be tested on any machine. Included inside a namespace, hence no
// #pragma once.
inline constexpr int TILE = 16, TILE_K = 32;

#ifndef SPAC_EMULATE_AMX
// Written as instructions: GCC 12's intrinsics do not say that they read memory.
struct Tiles {
  Tiles() {
    alignas(64) static const struct Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;

  template <int i, int j>
  void clear() {
    asm volatile("tilezero %%tmm%c0" ::"i"(2 * i + j));
  }
  template <int i>
  void load_a(const void* from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(4 + i), "r"(from), "r"(stride) : "memory");
  }
  template <int j>
  void load_b(const void* from) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(6 + j), "r"(from), "r"(int64_t{64})
                 : "memory");
  }
  template <int i, int j>
  void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(2 * i + j), "i"(4 + i), "i"(6 + j));
  }
  template <int i, int j>
  void store(float* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(2 * i + j), "r"(to), "r"(stride)
                 : "memory");
  }
};
#else
struct Tiles {
  float c[2][2][TILE][TILE];
  bf16 a[2][TILE][TILE_K], b[2][TILE][TILE][2];

  template <int i, int j>
  void clear() {
    std::memset(c[i][j], 0, sizeof(c[i][j]));
  }
  template <int i>
  void load_a(const void* from, int64_t stride) {
    for (int r = 0; r < TILE; ++r)
      std::memcpy(a[i][r], static_cast<const char*>(from) + r * stride, sizeof(a[i][r]));
  }
  template <int j>
  void load_b(const void* from) {
    std::memcpy(b[j], from, sizeof(b[j]));
  }
  template <int i, int j>
  void multiply() {
    for (int r = 0; r < TILE; ++r)
      for (int k = 0; k < TILE_K; ++k)
        for (int t = 0; t < TILE; ++t)
          c[i][j][r][t] += to_float(a[i][r][k]) * to_float(b[j][k / 2][t][k % 2]);
  }
  template <int i, int j>
  void store(float* to, int64_t stride) {
    for (int r = 0; r < TILE; ++r)
      std::memcpy(reinterpret_cast<char*>(to) + r * stride, c[i][j][r], sizeof(c[i][j][r]));
  }
};
#endif
