// The microkernels behind `ExpertKernels`. Included per ISA inside its namespace, after
// expert_ffn_tile.h, hence no #pragma once.
inline constexpr int PANEL_ROWS = 12;  // a multiple of every tile height

inline int64_t padded(int64_t k) {
  return (k + STEP - 1) / STEP * STEP;
}

// Where element i of a token goes inside a packed block of n tokens, relative to token 0.
template <class W>
inline int64_t packed_index(int64_t i, int64_t n) {
  const int64_t s = i / STEP, j = i % STEP;
  if constexpr (std::is_same_v<W, bf16>)
    return ((2 * s + j % 2) * n) * VL + j / 2;
  else
    return ((2 * s + j / VL) * n) * VL + j % VL;
}

template <class W, class X>
void pack_rows(const X* x, const int32_t* token, int count, int64_t k, float* out) {
  for (int n = 0; n < count; ++n) {
    const X* row = x + token[n] * k;
    float* to = out + n * VL;
    for (int64_t i = 0; i < k; i += STEP, to += 2 * count * VL) {
      X rest[STEP] = {};
      const X* p = row + i;
      if (i + STEP > k) {
        std::memcpy(rest, p, (k - i) * sizeof(X));
        p = rest;
      }
      if constexpr (std::is_same_v<W, bf16> == std::is_same_v<X, bf16>) {
        store(to, half<0>(p));
        store(to + count * VL, half<1>(p));
      } else {
        for (int j = 0; j < STEP; ++j) to[packed_index<W>(j, count)] = to_float(p[j]);
      }
    }
  }
}

template <class W>
void pack(const void* x, DType x_dtype, const int32_t* token, int count, int64_t k, float* out) {
  if (x_dtype == DType::bf16) pack_rows<W>(static_cast<const bf16*>(x), token, count, k, out);
  if (x_dtype == DType::f16) pack_rows<W>(static_cast<const f16*>(x), token, count, k, out);
  if (x_dtype == DType::f32) pack_rows<W>(static_cast<const float*>(x), token, count, k, out);
}

// ---- out[p * out_stride + r] = w[r] . x[p] for the rows of one expert and all its pairs

template <class W, int N>
void stream_rows(const W* w, int64_t w_stride, int rows, int64_t k, const float* x, const W* next,
                 float* out, int64_t out_stride) {
  constexpr int R = tile_rows(N);
  int r = 0;
  for (; r + R <= rows; r += R) {
    const W* ahead = r + 2 * R <= rows || !next ? w + (r + R) * w_stride : next;
    stream_tile<W, R, N>(w + r * w_stride, w_stride, x, k, ahead, out + r, out_stride);
  }
  for (; r < rows; ++r)
    stream_tile<W, 1, N>(w + r * w_stride, w_stride, x, k, w + r * w_stride, out + r, out_stride);
}

template <class W, int N = STREAM_TOKENS>
void stream(int tokens, const W* w, int64_t w_stride, int rows, int64_t k, const float* x,
            const W* next, float* out, int64_t out_stride) {
  if constexpr (N > 0) {
    if (tokens == N) return stream_rows<W, N>(w, w_stride, rows, k, x, next, out, out_stride);
    stream<W, N - 1>(tokens, w, w_stride, rows, k, x, next, out, out_stride);
  }
}

template <int R, int N>
void panel_block(int tokens, const float* panel, const float* x, int64_t steps, float* partial,
                 bool first, bool last, float* out, int64_t out_stride) {
  if constexpr (N > 0 && tile_rows(N + 1) <= R) {
    if (tokens == N)
      return panel_tile<R, N>(panel, x, steps, partial, first, last, out, out_stride);
    panel_block<R, N - 1>(tokens, panel, x, steps, partial, first, last, out, out_stride);
  }
}

// R rows at a time fit the widest block of the group.
template <class W, int R>
void blocked_rows(const W* w, int64_t w_stride, int rows, int64_t k, const Group& group,
                  const float* x, float* out, int64_t out_stride, float* scratch) {
  constexpr int N = ACCUMULATORS / R < BLOCK_TOKENS ? ACCUMULATORS / R : BLOCK_TOKENS;
  float* panel = scratch;
  float* partial = scratch + PANEL_ROWS * BLOCK_K;
  float tile[R * N] = {};
  const int64_t k_padded = padded(k);
  for (int64_t k0 = 0; k0 < k_padded; k0 += BLOCK_K) {
    const int64_t steps = (k0 + BLOCK_K < k_padded ? BLOCK_K : k_padded - k0) / STEP;
    const bool first = k0 == 0, last = k0 + BLOCK_K >= k_padded;
    for (int r = 0; r < rows; r += R)
      unpack_panel<W, R>(w + r * w_stride + k0, w_stride, rows - r < R ? rows - r : R, k - k0,
                         steps, panel + r * BLOCK_K);
    float* sums = partial;
    for (int b = 0; b < group.num_blocks; ++b) {
      const Block block = group.blocks[b];
      const float* xb = x + block.first * k_padded + k0 * block.count;
      for (int r = 0; r < rows; r += R) {
        panel_block<R, N>(block.count, panel + r * BLOCK_K, xb, steps, sums, first, last, tile, R);
        sums += block.count * R * VL;
        if (!last) continue;
        float* to = out + block.first * out_stride + r;
        for (int n = 0; n < block.count; ++n)
          for (int i = 0; i < R && r + i < rows; ++i) to[n * out_stride + i] = tile[n * R + i];
      }
    }
  }
}

template <class W>
void rows_dot(const W* w, int64_t w_stride, int rows, int64_t k, const Group& group, const float* x,
              const W* next, float* out, int64_t out_stride, float* scratch) {
  if (group.num_blocks == 1 && group.pairs <= STREAM_TOKENS)
    return stream<W>(group.pairs, w, w_stride, rows, k, x, next, out, out_stride);
  const int widest = group.blocks[0].count;
  for (int r = 0; r < rows; r += PANEL_ROWS) {
    const W* from = w + r * w_stride;
    const int some = rows - r < PANEL_ROWS ? rows - r : PANEL_ROWS;
    switch (tile_rows(widest)) {
      case 2:
        blocked_rows<W, 2>(from, w_stride, some, k, group, x, out + r, out_stride, scratch);
        break;
      case 3:
        blocked_rows<W, 3>(from, w_stride, some, k, group, x, out + r, out_stride, scratch);
        break;
      default:
        blocked_rows<W, 4>(from, w_stride, some, k, group, x, out + r, out_stride, scratch);
    }
  }
}

inline size_t dot_scratch(int64_t pairs) {
  return PANEL_ROWS * (BLOCK_K + pairs * VL);
}
inline int64_t row_stride(int64_t rows) {
  return (rows + VL - 1) / VL * VL;
}

inline size_t scratch(int64_t rows, int64_t pairs) {
  return dot_scratch(pairs) + 2 * row_stride(rows) * pairs;
}

// ---- projections

template <class W>
void gate_up(const FfnShape& s, const ExpertWeights& e, int64_t begin, int64_t end,
             const Group& group, const float* x, float* h, float* scratch, const void* next) {
  const int rows = static_cast<int>(end - begin);
  const int64_t stride = row_stride(rows), h_padded = padded(s.intermediate);
  float* gate = scratch + dot_scratch(group.pairs);
  float* up = gate + stride * group.pairs;
  const W* w_gate = static_cast<const W*>(e.gate) + begin * s.gate_stride;
  const W* w_up = w_gate + s.up_offset;
  rows_dot<W>(w_gate, s.gate_stride, rows, s.hidden, group, x, w_up, gate, stride, scratch);
  rows_dot<W>(w_up, s.gate_stride, rows, s.hidden, group, x, static_cast<const W*>(next), up,
              stride, scratch);
  if (s.bias) {
    const W* bias = static_cast<const W*>(e.gate_bias) + begin * s.bias_stride;
    for (int p = 0; p < group.pairs; ++p)
      for (int j = 0; j < rows; ++j) {
        gate[p * stride + j] += to_float(bias[j * s.bias_stride]);
        up[p * stride + j] += to_float(bias[j * s.bias_stride + s.bias_up_offset]);
      }
  }
  for (int p = 0; p < group.pairs; ++p)
    for (int j = rows; j < stride; ++j) gate[p * stride + j] = up[p * stride + j] = 0;
  activate(s.activation, s.alpha, s.limit, gate, up, stride * group.pairs);
  const int64_t zero_end = end == s.intermediate ? h_padded : end;
  for (int b = 0; b < group.num_blocks; ++b) {
    const Block block = group.blocks[b];
    for (int n = 0; n < block.count; ++n) {
      const float* from = gate + (block.first + n) * stride - begin;
      float* to = h + block.first * h_padded + n * VL;
      for (int64_t j = begin; j < end; ++j) to[packed_index<W>(j, block.count)] = from[j];
      for (int64_t j = end; j < zero_end; ++j) to[packed_index<W>(j, block.count)] = 0;
    }
  }
}

template <class W>
void down(const FfnShape& s, const ExpertWeights& e, int64_t begin, int64_t end, const Group& group,
          const float* h, const int32_t* token, const float* weight, float* y, int64_t y_stride,
          float* scratch, const void* next) {
  const int rows = static_cast<int>(end - begin);
  float* out = scratch + dot_scratch(group.pairs);
  const int64_t stride = row_stride(rows);
  float* bias = out + stride * group.pairs;
  const W* w = static_cast<const W*>(e.down) + begin * s.down_stride;
  rows_dot<W>(w, s.down_stride, rows, s.intermediate, group, h, static_cast<const W*>(next), out,
              stride, scratch);
  for (int r = 0; r < rows; ++r)
    bias[r] = s.bias ? to_float(static_cast<const W*>(e.down_bias)[begin + r]) : 0;
  for (int p = 0; p < group.pairs; ++p) {
    float* to = y + token[p] * y_stride;
    for (int r = 0; r < rows; ++r) to[r] += weight[p] * (out[p * stride + r] + bias[r]);
  }
}

template <class W>
inline constexpr ExpertKernels kernels = {STREAM_TOKENS, BLOCK_TOKENS, STEP,   pack<W>,
                                          gate_up<W>,    down<W>,      scratch};

const ExpertKernels& expert_kernels(DType weights) {
  if (weights == DType::bf16) return kernels<bf16>;
  if (weights == DType::f16) return kernels<f16>;
  return kernels<float>;
}
