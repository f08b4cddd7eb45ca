// Runs every microkernel on heap blocks of exactly the right size, so that AddressSanitizer sees a
// read or write past any of them, and checks the sums in double. No torch.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "expert_ffn_run.h"

using namespace spac;

namespace {
struct Buffer {  // malloc'ed, exact, `shift` bytes off any alignment
  std::unique_ptr<char, void (*)(void*)> owner{nullptr, std::free};
  char* data;
  Buffer(size_t bytes, size_t shift)
      : owner(static_cast<char*>(std::malloc(bytes + shift)), std::free) {
    data = owner.get() + shift;
  }
};

double store_as(DType type, char* to, int64_t i, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (type == DType::f32) {
    std::memcpy(to + 4 * i, &value, 4);
    return value;
  }
  // 1/16 steps up to 1 are exact in bf16 and fp16.
  uint16_t half = static_cast<uint16_t>(bits >> 16);
  if (type == DType::f16 && value != 0)
    half = static_cast<uint16_t>((bits >> 16 & 0x8000) | (((bits >> 23 & 0xff) - 112) << 10) |
                                 (bits >> 13 & 0x3ff));
  else if (type == DType::f16)
    half = 0;
  std::memcpy(to + 2 * i, &half, 2);
  return value;
}

// `rows` rows of `k` random weights of type i8 or i4 and their scales, as spac/quantize.py has them.
void store_quantised(DType type, std::mt19937& random, int64_t rows, int64_t k, char* to,
                     char* scales, std::vector<double>& values) {
  const int64_t group = type == DType::i8 ? k : type == DType::i4_32 ? 32 : 128;
  for (int64_t i = 0; i < rows * k; ++i) {
    const bool int8 = type == DType::i8;
    const float scale = static_cast<float>(1 + i / group % 3) / (int8 ? 512 : 16);
    store_as(int8 ? DType::f32 : DType::f16, scales, i / group, scale);
    if (int8) to[i] = static_cast<char>(static_cast<int>(random() % 255) - 127);
    if (!int8 && i % 2 == 0) to[i / 2] = static_cast<char>(random());
    const int q = int8 ? static_cast<int8_t>(to[i]) : (to[i / 2] >> i % 2 * 4 & 15) - 8;
    values.push_back(scale * q);
  }
}

int check(Isa isa, DType w_type, DType x_type, int64_t H, int64_t I, int64_t T, int64_t k,
          int64_t E, int threads, bool bias) {
  std::mt19937 random(static_cast<unsigned>(H * 131 + I * 17 + T));
  const auto value = [&] { return (static_cast<int>(random() % 33) - 16) / 16.0f; };
  const size_t size = w_type == DType::f32 ? 4 : 2, x_size = x_type == DType::f32 ? 4 : 2;
  const int64_t elements = 3 * H * I + 2 * I + H;
  // Quantised experts are scales, fp32 biases, then weights: the last rows end with the block.
  const bool quantised = w_type >= DType::i8, int8 = w_type == DType::i8;
  const int64_t per_scale = w_type == DType::i4_32 ? 32 : 128, per_byte = int8 ? 1 : 2;
  const int64_t gate_scales = int8 ? 2 * I * 4 : 2 * I * H / per_scale * 2;
  const int64_t down_scales = int8 ? H * 4 : H * I / per_scale * 2;
  const int64_t before = gate_scales + down_scales + (2 * I + H) * 4;
  std::vector<Buffer> blobs;
  std::vector<std::vector<double>> w(E);
  std::vector<int64_t> address;
  for (int64_t e = 0; e < E; ++e) {
    if (quantised) {
      blobs.emplace_back(before + 3 * H * I / per_byte, 4);
      char* const data = blobs[e].data;
      char* const gate = data + before;
      store_quantised(w_type, random, 2 * I, H, gate, data, w[e]);
      store_quantised(w_type, random, H, I, gate + 2 * H * I / per_byte, data + gate_scales, w[e]);
      for (int64_t i = 0; i < 2 * I + H; ++i)
        w[e].push_back(store_as(DType::f32, data + gate_scales + down_scales, i, value()));
    } else {
      blobs.emplace_back(elements * size, size);
      for (int64_t i = 0; i < elements; ++i)
        w[e].push_back(store_as(w_type, blobs[e].data, i, value()));
    }
    char* const first = blobs[e].data + (quantised ? before : 0);
    address.push_back(e == 1 ? 0 : reinterpret_cast<int64_t>(first));
  }
  Buffer x(T * H * x_size, x_size), y(T * H * 4, 0);
  std::vector<double> xd;
  for (int64_t i = 0; i < T * H; ++i) xd.push_back(store_as(x_type, x.data, i, value()));
  std::vector<int32_t> ids;
  std::vector<float> weights;
  for (int64_t i = 0; i < T * k; ++i) {
    ids.push_back(static_cast<int32_t>(random() % (E + 2)) - 1);
    weights.push_back(value());
  }
  FfnCall call{};
  call.shape = {H, I, H, I * H, I, bias, 1, I, Activation::relu, 0, 0};
  call.x_dtype = x_type;
  call.w_dtype = w_type;
  call.x = x.data;
  call.ids = ids.data();
  call.weights = weights.data();
  call.address = address.data();
  call.tokens = T;
  call.k = k;
  call.experts = E;
  call.down_offset = 2 * H * I * size;
  call.gate_up_bias_offset = 3 * H * I * size;
  call.down_bias_offset = (3 * H * I + 2 * I) * size;
  if (quantised) {
    call.shape.gate_stride = H / per_byte;
    call.shape.up_offset = I * H / per_byte;
    call.shape.down_stride = I / per_byte;
    call.down_offset = 2 * H * I / per_byte;
    call.gate_up_scale_offset = -before;
    call.down_scale_offset = gate_scales - before;
    call.gate_up_bias_offset = gate_scales + down_scales - before;
    call.down_bias_offset = call.gate_up_bias_offset + 2 * I * 4;
  }
  call.y = reinterpret_cast<float*>(y.data);
  per_process<ExpertFfn>().run(call, expert_kernels(isa, w_type, x_type), threads);

  const auto tiled = [&](int64_t e) {  // then act(gate) * up is rounded to bf16
    return isa == Isa::amx && w_type == DType::bf16 && std::count(ids.begin(), ids.end(), e) >= 8;
  };
  double worst = 0, scale = 1;
  for (int64_t t = 0; t < T; ++t) {
    std::vector<double> expected(H, 0.0);
    for (int64_t j = 0; j < k; ++j) {
      const int64_t e = ids[t * k + j];
      if (e < 0 || e >= E || e == 1) continue;
      const double* b = w[e].data() + 3 * H * I;
      std::vector<double> h(I);
      for (int64_t i = 0; i < I; ++i) {
        double gate = bias ? b[i] : 0, up = bias ? b[I + i] : 0;
        for (int64_t n = 0; n < H; ++n) {
          gate += w[e][i * H + n] * xd[t * H + n];
          up += w[e][(I + i) * H + n] * xd[t * H + n];
        }
        h[i] = std::fmax(gate, 0) * up;
        if (tiled(e)) {
          const float exact = static_cast<float>(h[i]);  // |gate| and |up| are short sums: exact
          uint32_t bits;
          std::memcpy(&bits, &exact, 4);
          h[i] = from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000);
        }
      }
      for (int64_t n = 0; n < H; ++n) {
        double out = bias ? b[2 * I + n] : 0;
        for (int64_t i = 0; i < I; ++i) out += w[e][2 * H * I + n * I + i] * h[i];
        expected[n] += weights[t * k + j] * out;
      }
    }
    for (int64_t n = 0; n < H; ++n) {
      scale = std::fmax(scale, std::fabs(expected[n]));
      worst = std::fmax(worst, std::fabs(call.y[t * H + n] - expected[n]));
    }
  }
  // Integers of 15 bits hold x, but not act(gate) * up.
  if (worst <= (quantised && x_type != DType::f32 ? 1e-4 : 1e-5) * scale) return 0;
  std::printf("%s w=%d x=%d H=%ld I=%ld T=%ld: error %g of %g\n", kIsaNames[static_cast<int>(isa)],
              static_cast<int>(w_type), static_cast<int>(x_type), static_cast<long>(H),
              static_cast<long>(I), static_cast<long>(T), worst, scale);
  return 1;
}
}  // namespace

int main() {
  int failures = 0, runs = 0;
  for (Isa isa : kIsas) {
    if (!isa_supported(isa)) continue;
    using Sizes = std::vector<std::array<int64_t, 5>>;
    const auto all = [&](std::vector<DType> weights, const Sizes& sizes) {
      for (DType w : weights)
        for (DType x : {DType::bf16, DType::f16, DType::f32})
          for (auto [H, I, T, k, E] : sizes)
            for (int threads : {1, 3}) {
              failures += check(isa, w, x, H, I, T, k, E, threads, (H + T) % 2 == 0);
              ++runs;
            }
    };
    all({DType::bf16, DType::f16, DType::f32}, {{1, 1, 1, 1, 1},
                                                {7, 3, 5, 2, 3},
                                                {33, 31, 1, 4, 6},
                                                {65, 17, 23, 3, 4},
                                                {130, 37, 49, 1, 2},
                                                {833, 26, 40, 1, 1},
                                                {64, 70, 100, 1, 1},
                                                {40, 521, 15, 2, 2}});
    all({DType::i8}, {{1, 1, 1, 1, 1}, {65, 17, 23, 3, 4}, {261, 70, 40, 1, 1}});
    all({DType::i4_32}, {{32, 32, 1, 1, 1}, {96, 64, 23, 3, 4}, {288, 32, 40, 1, 1}});
    all({DType::i4_128}, {{128, 128, 3, 1, 1}, {384, 128, 13, 2, 3}});
  }
  std::printf("%d runs, %d failures\n", runs, failures);
  return failures != 0;
}
