// Register tiles: R weight rows times N packed token rows, summed along K. Included per ISA inside
// its namespace, after simd_<isa>.h, hence no #pragma once.
inline constexpr int STEP = 2 * VL;  // weights of a row per step

// Rows of a tile: 8 where the accumulators hold them, since more rows are more streams from memory;
// then 4, whose sums are written together, or 2.
constexpr int tile_rows(int tokens) {
  const int rows = ACCUMULATORS / tokens;
  return rows >= 8 && !LONG_STREAMS ? 8 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
}

// Keeps the fewer of the weights and the tokens of half a step in registers, and takes the others
// one by one: 12 sums, 3 tokens and a weight are the 16 registers of AVX2.
template <int R, int N, class Load>
inline __attribute__((always_inline)) void step(V (&acc)[N][R], const float* x, Load load_row) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    if constexpr (N < R) {
      V xs[N];
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) xs[n] = load(x + (h * N + n) * VL);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const V w = load_row(r, h);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) accumulate(acc[n][r], w, xs[n]);
      }
    } else {
      V w[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) w[r] = load_row(r, h);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        const V xn = load(x + (h * N + n) * VL);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) accumulate(acc[n][r], w[r], xn);
      }
    }
  }
}

// out[n * out_stride + r] = lane sums of acc[n][r].
template <int R, int N>
inline __attribute__((always_inline)) void write_sums(V (&acc)[N][R], float* out,
                                                      int64_t out_stride) {
  if constexpr (R % 4 == 0) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 16
      for (int r = 0; r < R; r += 4)
        sum4(acc[n][r], acc[n][r + 1], acc[n][r + 2], acc[n][r + 3], out + n * out_stride + r);
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

// Sums are kept in `partial` between the slices of K.
template <int R, int N>
inline __attribute__((always_inline)) void load_sums(V (&acc)[N][R], const float* partial) {
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) acc[n][r] = load(partial + (n * R + r) * VL);
}
template <int R, int N>
inline __attribute__((always_inline)) void store_sums(const V (&acc)[N][R], float* partial) {
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) store(partial + (n * R + r) * VL, acc[n][r]);
}

// out[n * out_stride + r] = w[r] . x[n] over k weights of each row, row r being w + r * w_stride.
// Meanwhile P other rows, `ahead_stride` bytes apart, are fetched, A bytes of each per step.
template <class W, int R, int N, int P, int A>
__attribute__((noinline)) void row_tile(const W* w, int64_t w_stride, const float* x, int64_t k,
                                        const char* ahead, int64_t ahead_stride, float* partial,
                                        bool first, bool last, float* out, int64_t out_stride) {
  V acc[N][R] = {};
  if (!first) load_sums<R, N>(acc, partial);
  const int64_t whole = k - k % STEP;
  for (int64_t i = 0; i < whole; i += STEP) {
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p)
      for (int line = 0; line < A; line += 64)
        __builtin_prefetch(ahead + p * ahead_stride + line, 0, 3);
    ahead += A;
    step<R, N>(acc, x, [&](int r, int h) {
      const W* p = w + r * w_stride + i;
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
  if (last)
    write_sums<R, N>(acc, out, out_stride);
  else
    store_sums<R, N>(acc, partial);
}

// Unpacks k weights of a row to floats in packed order, zero up to a multiple of STEP.
template <class W>
void unpack_row(const W* w, int64_t k, float* out) {
  int64_t i = 0;
  for (; i + STEP <= k; i += STEP) {
    store(out + i, half<0>(w + i));
    store(out + i + VL, half<1>(w + i));
  }
  if (i == k) return;
  W rest[STEP] = {};
  std::memcpy(rest, w + i, (k - i) * sizeof(W));
  store(out + i, half<0>(rest));
  store(out + i + VL, half<1>(rest));
}
