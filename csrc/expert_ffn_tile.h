// Register tiles: R weight rows times N packed token rows, summed along K. Included per ISA inside
// its namespace, after simd_<isa>.h, hence no #pragma once.
inline constexpr int STEP = 2 * VL;  // weights of a row per step

// Rows of a tile: as many as the accumulators hold; ways to load a row do not grow beyond 4.
constexpr int tile_rows(int tokens) {
  const int rows = ACCUMULATORS / tokens;
  return rows > 4 ? 4 : rows;
}

template <int R, int N, class Load>
inline __attribute__((always_inline)) void step(V (&acc)[N][R], const float* x, Load load_row) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    V w[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) w[r] = load_row(r, h);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      const V xn = load(x + (h * N + n) * VL);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[n][r] = fma(w[r], xn, acc[n][r]);
    }
  }
}

// out[n * out_stride + r] = lane sums of acc[n][r].
template <int R, int N>
inline __attribute__((always_inline)) void write_sums(V (&acc)[N][R], float* out,
                                                      int64_t out_stride) {
  if constexpr (R == 4) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n)
      sum4(acc[n][0], acc[n][1], acc[n][2], acc[n][3], out + n * out_stride);
  } else {
    constexpr int M = N * R;
    float sums[M + 3];
#pragma GCC unroll 16
    for (int i = 0; i < M; i += 4) {
      const auto at = [&](int j) { return j < M ? acc[j / R][j % R] : V{}; };
      sum4(at(i), at(i + 1), at(i + 2), at(i + 3), sums + i);
    }
    for (int n = 0; n < N; ++n)
      for (int r = 0; r < R; ++r) out[n * out_stride + r] = sums[n * R + r];
  }
}

// Streaming: rows as they lie in memory. Row r of this tile is w + r * w_stride; `ahead` is where
// the rows after these are, fetched as these are used.
template <class W, int R, int N>
void stream_tile(const W* w, int64_t w_stride, const float* x, int64_t k, const W* ahead,
                 float* out, int64_t out_stride) {
  V acc[N][R] = {};
  const int64_t whole = k - k % STEP;
  for (int64_t i = 0; i < whole; i += STEP) {
    step<R, N>(acc, x, [&](int r, int h) {
      const W* p = w + r * w_stride + i;
      if (h == 0)
        for (size_t line = 0; line < STEP * sizeof(W); line += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(ahead + r * w_stride + i) + line, 0, 3);
      return h == 0 ? half<0>(p) : half<1>(p);
    });
    x += 2 * N * VL;
  }
  if (whole < k) {
    W rest[R][STEP] = {};
    for (int r = 0; r < R; ++r)
      std::memcpy(rest[r], w + r * w_stride + whole, (k - whole) * sizeof(W));
    step<R, N>(acc, x, [&](int r, int h) { return h == 0 ? half<0>(rest[r]) : half<1>(rest[r]); });
  }
  write_sums<R, N>(acc, out, out_stride);
}

// Blocked: rows unpacked to floats as [steps][2][R][VL]. `partial` keeps the accumulators between
// the pieces of K.
template <int R, int N>
void panel_tile(const float* panel, const float* x, int64_t steps, float* partial, bool first,
                bool last, float* out, int64_t out_stride) {
  V acc[N][R] = {};
  if (!first)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[n][r] = load(partial + (n * R + r) * VL);
  for (int64_t s = 0; s < steps; ++s) {
    step<R, N>(acc, x, [&](int r, int h) { return load(panel + (h * R + r) * VL); });
    x += 2 * N * VL;
    panel += 2 * R * VL;
  }
  if (last) {
    write_sums<R, N>(acc, out, out_stride);
    return;
  }
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) store(partial + (n * R + r) * VL, acc[n][r]);
}

// Unpacks R rows, of which `rows` exist, and `steps` steps, of which k columns exist; else zeros.
template <class W, int R>
void unpack_panel(const W* w, int64_t w_stride, int rows, int64_t k, int64_t steps, float* panel) {
  for (int64_t s = 0; s < steps; ++s) {
    for (int r = 0; r < R; ++r) {
      V lo{}, hi{};
      if (r < rows) {
        const W* p = w + r * w_stride + s * STEP;
        W rest[STEP] = {};
        if ((s + 1) * STEP > k) {
          std::memcpy(rest, p, (k - s * STEP) * sizeof(W));
          p = rest;
        }
        lo = half<0>(p);
        hi = half<1>(p);
      }
      store(panel + r * VL, lo);
      store(panel + (R + r) * VL, hi);
    }
    panel += 2 * R * VL;
  }
}
