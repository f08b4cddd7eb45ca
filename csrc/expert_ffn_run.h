// The driver: groups the pairs by expert and hands rows to threads. Three passes with a barrier
// between them: pack the tokens, then gate and up, then down. Threads take (expert, rows) items as
// they come, but an output element is always computed by one thread in one order (experts
// ascending), so the result does not depend on the number of threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

#include "expert_ffn.h"
#include "thread_pool.h"

namespace spac {

struct FfnCall {
  FfnShape shape;
  DType x_dtype, w_dtype;
  const void* x;    // [tokens, hidden]
  const void* ids;  // [tokens, k], int32 or int64
  bool ids_are_64;
  const float* weights;    // [tokens, k]
  const int64_t* address;  // [experts], 0 = absent
  int64_t tokens, k, experts;
  // Bytes from address[e], each with a skew per expert.
  int64_t down_offset, down_skew;
  int64_t gate_up_bias_offset, gate_up_bias_skew, down_bias_offset, down_bias_skew;
  float* y;  // [tokens, hidden]

  ExpertWeights expert(int64_t e) const {
    const auto at = [&](int64_t offset, int64_t skew) {
      return reinterpret_cast<const void*>(address[e] + offset + e * skew);
    };
    return {at(0, 0), at(down_offset, down_skew),
            shape.bias ? at(gate_up_bias_offset, gate_up_bias_skew) : nullptr,
            shape.bias ? at(down_bias_offset, down_bias_skew) : nullptr};
  }
};

// Tokens taken together; more would push packed activations out of the caches.
inline constexpr int64_t kPairsAtOnce = 4096;

class ExpertFfn {
 public:
  // Calls from several threads take turns: they share the workers and the scratch memory.
  void run(const FfnCall& call, const ExpertKernels& kernels, int threads) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t at_once = std::max<int64_t>(1, kPairsAtOnce / std::max<int64_t>(1, call.k));
    for (int64_t t = 0; t < call.tokens; t += at_once)
      run_tokens(call, kernels, threads, t, std::min(call.tokens, t + at_once));
  }

  // job(thread, threads) on the same workers, between two calls.
  template <class Job>
  void run_job(int threads, Job job) {
    const std::lock_guard<std::mutex> lock(mutex_);
    pool_.run(threads, job);
  }

  void stay_awake(bool awake) { pool_.stay_awake(awake); }

 private:
  struct Expert {
    ExpertWeights weights;
    Group group;
    int32_t first;  // pair
  };
  struct Item {
    int32_t expert, begin, end;
  };

  static int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

  void run_tokens(const FfnCall& call, const ExpertKernels& kernels, int threads, int64_t t0,
                  int64_t t1) {
    group_pairs(call, kernels, t0, t1);
    const int64_t H = call.shape.hidden, I = call.shape.intermediate;
    const int64_t h_in = padded(H, kernels.step), h_mid = padded(I, kernels.step);
    const int64_t pairs = static_cast<int64_t>(token_.size());
    int64_t most = 0;
    for (const Expert& e : experts_) most = std::max<int64_t>(most, e.group.pairs);
    split_rows(kernels, I);
    const int64_t down_rows = pairs > 512 ? 64 : 32;
    const int64_t down_items = (H + down_rows - 1) / down_rows;
    const int64_t scratch = padded(kernels.scratch(down_rows, most) + (t1 - t0) * down_rows, 16);

    const size_t need = pairs * (h_in + h_mid) + scratch * threads + 16;
    if (memory_.size() < need) memory_ = std::vector<float>(need);
    float* base = memory_.data();
    while (reinterpret_cast<uintptr_t>(base) % 64) ++base;
    float* const x = base;
    float* const h = x + pairs * h_in;
    float* const scratches = h + pairs * h_mid;

    std::atomic<int64_t> next[3] = {0, 0, 0};
    // Each thread knows its next item while it works on one, so that it can prefetch it.
    const auto drain = [](std::atomic<int64_t>& counter, int64_t n, auto&& work) {
      int64_t i = counter.fetch_add(1, std::memory_order_relaxed);
      while (i < n) {
        const int64_t then = counter.fetch_add(1, std::memory_order_relaxed);
        work(i, then < n ? then : -1);
        i = then;
      }
    };
    const int64_t element = call.w_dtype == DType::f32 ? 4 : 2;

    pool_.run(threads, [&](int thread, int n) {
      float* const mine = scratches + scratch * thread;
      drain(next[0], static_cast<int64_t>(pack_items_.size()), [&](int64_t i, int64_t) {
        const Item item = pack_items_[i];
        const int first = experts_[item.expert].first + item.begin;
        kernels.pack(call.x, call.x_dtype, token_.data() + first, item.end - item.begin, H,
                     x + first * h_in);
      });
      pool_.barrier(n);
      drain(next[1], static_cast<int64_t>(items_.size()), [&](int64_t i, int64_t then) {
        const Item item = items_[i];
        const Expert& e = experts_[item.expert];
        const void* ahead = nullptr;
        if (then >= 0)
          ahead = static_cast<const char*>(experts_[items_[then].expert].weights.gate) +
                  items_[then].begin * call.shape.gate_stride * element;
        kernels.gate_up(call.shape, e.weights, item.begin, item.end, e.group, x + e.first * h_in,
                        h + e.first * h_mid, mine, ahead);
      });
      pool_.barrier(n);
      float* const sums = mine + scratch - (t1 - t0) * down_rows;
      drain(next[2], down_items, [&](int64_t i, int64_t then) {
        const int64_t begin = i * down_rows, end = std::min(H, begin + down_rows);
        std::fill(sums, sums + (t1 - t0) * down_rows, 0.0f);
        for (size_t j = 0; j < experts_.size(); ++j) {
          const Expert& e = experts_[j];
          const Expert& following = experts_[j + 1 < experts_.size() ? j + 1 : 0];
          const int64_t row = j + 1 < experts_.size() ? begin : then * down_rows;
          const void* ahead = row < 0 ? nullptr
                                      : static_cast<const char*>(following.weights.down) +
                                            row * call.shape.down_stride * element;
          kernels.down(call.shape, e.weights, begin, end, e.group, h + e.first * h_mid,
                       local_.data() + e.first, weight_.data() + e.first, sums, down_rows, mine,
                       ahead);
        }
        for (int64_t t = t0; t < t1; ++t)
          std::copy_n(sums + (t - t0) * down_rows, end - begin, call.y + t * H + begin);
      });
    });
  }

  // Pairs by expert, in token order; local_ counts tokens from t0.
  void group_pairs(const FfnCall& call, const ExpertKernels& kernels, int64_t t0, int64_t t1) {
    const auto id = [&](int64_t i) {
      const int64_t e = call.ids_are_64 ? static_cast<const int64_t*>(call.ids)[i]
                                        : static_cast<const int32_t*>(call.ids)[i];
      return e >= 0 && e < call.experts && call.address[e] != 0 ? e : -1;
    };
    start_.assign(call.experts + 1, 0);
    for (int64_t i = t0 * call.k; i < t1 * call.k; ++i)
      if (const int64_t e = id(i); e >= 0) ++start_[e + 1];
    for (int64_t e = 0; e < call.experts; ++e) start_[e + 1] += start_[e];
    const int32_t pairs = start_[call.experts];
    token_.resize(pairs), local_.resize(pairs), weight_.resize(pairs);
    cursor_.assign(start_.begin(), start_.end() - 1);
    for (int64_t i = t0 * call.k; i < t1 * call.k; ++i) {
      const int64_t e = id(i);
      if (e < 0) continue;
      const int32_t to = cursor_[e]++;
      token_[to] = static_cast<int32_t>(i / call.k);
      local_[to] = static_cast<int32_t>(i / call.k - t0);
      weight_[to] = call.weights[i];
    }
    experts_.clear(), blocks_.clear(), pack_items_.clear();
    blocks_.reserve(pairs);  // groups point into it
    for (int64_t e = 0; e < call.experts; ++e) {
      const int32_t n = start_[e + 1] - start_[e];
      if (n == 0) continue;
      const int widest = n <= kernels.stream_tokens ? n : kernels.block_tokens;
      const int count = (n + widest - 1) / widest;
      const Block* blocks = blocks_.data() + blocks_.size();
      for (int32_t b = 0, first = 0; b < count; ++b) {
        const int32_t size = n / count + (b < n % count);
        pack_items_.push_back({static_cast<int32_t>(experts_.size()), first, first + size});
        blocks_.push_back({first, size});
        first += size;
      }
      experts_.push_back({call.expert(e), {blocks, count, n}, start_[e]});
    }
  }

  // Items of about the same time, the long ones first so that no thread ends with one.
  void split_rows(const ExpertKernels& kernels, int64_t intermediate) {
    order_.resize(experts_.size());
    for (size_t n = 0; n < order_.size(); ++n) order_[n] = static_cast<int32_t>(n);
    std::stable_sort(order_.begin(), order_.end(), [&](int32_t a, int32_t b) {
      return experts_[a].group.pairs > experts_[b].group.pairs;
    });
    items_.clear();
    for (int32_t n : order_) {
      const int64_t rows = experts_[n].group.pairs <= kernels.stream_tokens ? 16 : 24;
      for (int64_t j = 0; j < intermediate; j += rows)
        items_.push_back(
            {n, static_cast<int32_t>(j), static_cast<int32_t>(std::min(intermediate, j + rows))});
    }
  }

  std::mutex mutex_;
  ThreadPool pool_;
  std::vector<float> memory_;
  std::vector<int32_t> start_, cursor_, token_, local_, order_;
  std::vector<float> weight_;
  std::vector<Expert> experts_;
  std::vector<Block> blocks_;
  std::vector<Item> items_, pack_items_;
};

}  // namespace spac
