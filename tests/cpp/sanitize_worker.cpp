// A device of this program's own rings the bells of a Worker, for ThreadSanitizer: every layer of
// every window gets its own rows back, also after windows that the device gives up, or in which it
// does not wait because the worker has nothing to do. It prints the time from the bell to the computation and from its end to the device. No torch.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "worker.h"

using namespace spac;

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 200;
  constexpr int64_t H = 5, I = 3, E = 2, T = 4, k = 2, kLayers = 3;
  // Expert e of layer l: gate and up of ones, down of l + e + 1.
  std::vector<std::vector<float>> weights;
  std::vector<int64_t> address;
  for (int64_t n = 0; n < kLayers * E; ++n) {
    weights.emplace_back(3 * H * I, 1.0f);
    std::fill_n(weights.back().data() + 2 * H * I, H * I, static_cast<float>(n / E + n % E + 1));
  }
  for (const auto& w : weights) address.push_back(reinterpret_cast<int64_t>(w.data()));
  std::vector<int32_t> flags(2 * kLayers), ids(T * k);
  std::vector<float> x(T * H), gates(T * k), back(T * H);
  std::vector<int64_t> times(2 * kLayers);
  int32_t* const done = flags.data() + kLayers;
  long wrong = 0;
  std::vector<int64_t> to_worker{0}, to_device{0};  // ns
  const auto now = [] { return std::chrono::steady_clock::now().time_since_epoch().count(); };
  {
    Worker worker({flags.data(), done, x.data(), DType::f32, ids.data(), gates.data(), back.data(),
                   times.data(), k},
                  false);
    for (int64_t l = 0; l < kLayers; ++l) {
      FfnCall table{};
      table.shape = {H, I, H, I * H, I, false, 1, I, Activation::relu, 0, 0};
      table.w_dtype = DType::f32;
      table.address = address.data() + l * E;
      table.experts = E;
      table.down_offset = 2 * H * I * 4;
      worker.add_layer(table);
    }
    worker.start();
    for (int round = 1; round <= rounds; ++round) {
      const int64_t width = 1 + round % T, layers = round % 7 ? kLayers : round % kLayers;
      worker.begin(width, 1 + round % 2, nullptr);
      for (int64_t l = 0; l < layers; ++l) {
        if (round % 11 == 3 || (round + l) % 4 == 0) {
          __atomic_store_n(&flags[l], 2 * round, __ATOMIC_RELEASE);
          continue;
        }
        for (int64_t i = 0; i < width * H; ++i) x[i] = static_cast<float>((round + i / H) % 4);
        for (int64_t i = 0; i < width * k; ++i) {
          ids[i] = i == 0 ? 0 : static_cast<int32_t>((round + i + l) % (E + 1)) - 1;
          gates[i] = static_cast<float>(i % k + 1);
        }
        const int64_t rung = now();
        __atomic_store_n(&flags[l], 2 * round + 1, __ATOMIC_RELEASE);
        spin_until([&] { return __atomic_load_n(&done[l], __ATOMIC_ACQUIRE) >= round; });
        to_worker.push_back(times[2 * l] - rung);
        to_device.push_back(now() - times[2 * l + 1]);
        for (int64_t t = 0; t < width; ++t) {
          const float h = H * x[t * H] * H * x[t * H];
          float expected = 0;
          for (int64_t j = 0; j < k; ++j)
            if (const int32_t e = ids[t * k + j]; e >= 0)
              expected += gates[t * k + j] * I * h * static_cast<float>(l + e + 1);
          for (int64_t n = 0; n < H; ++n) wrong += back[t * H + n] != expected;
        }
      }
    }
    wrong += !worker.error().empty();
  }
  const auto median = [](std::vector<int64_t>& v) {
    std::nth_element(v.begin(), v.begin() + v.size() / 2, v.end());
    return v[v.size() / 2] / 1e3;
  };
  std::printf("%d rounds, %ld wrong; medians: bell to start %.2f us, end to device %.2f us\n",
              rounds, wrong, median(to_worker), median(to_device));
  return wrong != 0;
}
