// The driver: groups the pairs by expert and hands rows to threads, in passes: pack the tokens,
// then gate and up, then, for some kernels, pack what comes out, then down. An output element is
// always computed by one thread in one order (experts ascending), so the result does not depend on
// the number of threads or on who computes what.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

#include "expert_ffn.h"
#include "thread_pool.h"
#include "work_split.h"

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
  int64_t gate_up_scale_offset, down_scale_offset;

  ExpertWeights expert(int64_t e) const {
    const auto at = [&](int64_t offset, int64_t skew) {
      return reinterpret_cast<const void*>(address[e] + offset + e * skew);
    };
    return {at(0, 0), at(down_offset, down_skew),
            shape.bias ? at(gate_up_bias_offset, gate_up_bias_skew) : nullptr,
            shape.bias ? at(down_bias_offset, down_bias_skew) : nullptr,
            at(gate_up_scale_offset, 0),
            at(down_scale_offset, 0)};
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

  // work(unit) for units 0..n on the same workers, between two calls.
  template <class Work>
  void run_job(int threads, int64_t units, Work work) {
    const std::lock_guard<std::mutex> lock(mutex_);
    split_.assign(0, threads, [=](int t) { return static_cast<uint32_t>(units * t / threads); });
    pool_.run(threads, [&](int thread, int n) {
      split_.run(0, thread, n, 1, [&](int32_t unit, int32_t, int32_t) { work(unit); });
      if (thread == 0) split_.wait(0);
    });
  }

  void stay_awake(bool awake) { pool_.stay_awake(awake); }

 private:
  struct Expert {
    ExpertWeights weights;
    Group group;
    int32_t first;            // pair
    int32_t rows, unit, end;  // of gate and up: rows of a unit, the first unit, the one past the last
    int64_t cost;             // up to `end`
  };
  struct Packing {
    int32_t first, count;  // pairs
  };

  static int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

  void run_tokens(const FfnCall& call, const ExpertKernels& kernels, int threads, int64_t t0,
                  int64_t t1) {
    group_pairs(call, kernels, t0, t1);
    const int64_t H = call.shape.hidden, I = call.shape.intermediate;
    const int64_t h_in = kernels.packed(H), h_mid = kernels.packed(I);
    const int64_t h_plain = kernels.pack_h ? I : 0;
    const int64_t pairs = static_cast<int64_t>(token_.size());
    int64_t most = 0;
    for (const Expert& e : experts_) most = std::max<int64_t>(most, e.group.pairs);
    const int64_t down_rows = most > kernels.stream_tokens ? kernels.panel_rows : kStreamRows;
    const auto at_once = static_cast<uint32_t>(kRowsAtOnce / down_rows);
    const int64_t scratch =
        padded(kernels.scratch(kRowsAtOnce, most) + (t1 - t0) * kRowsAtOnce, 16);
    threads = std::min<int64_t>(threads, 1 + 3 * H * I * pairs / kWorthAThread);
    split_work(kernels, threads, I, (H + down_rows - 1) / down_rows);

    const size_t need = pairs * (h_in + h_mid + h_plain) + scratch * threads + 32;
    if (memory_.size() < need) memory_ = std::vector<float>(need);
    float* base = memory_.data();
    while (reinterpret_cast<uintptr_t>(base) % 64) ++base;
    float* const x = base;
    float* const h = x + pairs * h_in;
    float* const plain = h + pairs * h_mid;
    float* const scratches = plain + padded(pairs * h_plain, 16);

    const int64_t element = unit_bytes(call.w_dtype);
    const int64_t gate_bytes = call.shape.gate_stride * element;
    const int64_t down_bytes = down_rows * call.shape.down_stride * element;
    const auto row = [](const void* weights, int64_t offset) -> const void* {
      return static_cast<const char*>(weights) + offset;
    };

    pool_.run(threads, [&](int thread, int n) {
      float* const mine = scratches + scratch * thread;
      split_.run(kPack, thread, n, at_once, [&](int32_t begin, int32_t end, int32_t) {
        for (; begin < end; ++begin) {
          const Packing some = packing_[begin];
          kernels.pack(call.x, call.x_dtype, token_.data() + some.first, some.count, H,
                       x + some.first * h_in);
        }
      });
      split_.wait(kPack);
      int32_t at = 0;  // units come nearly in order, and so do their experts
      split_.run(kGateUp, thread, n, at_once, [&](int32_t begin, int32_t end, int32_t then) {
        while (begin < experts_[at].unit) --at;
        while (begin < end) {
          while (begin >= experts_[at].end) ++at;
          const Expert& e = experts_[at];
          const int32_t stop = std::min(end, e.end), next = stop < end ? stop : then;
          const void* ahead = nullptr;
          if (next >= 0) {
            const Expert& other = experts_[next < e.end ? at : at + 1];
            ahead = row(other.weights.gate, (next - other.unit) * other.rows * gate_bytes);
          } else if (const int32_t down = split_.first_of(kDown, thread); down >= 0) {
            ahead = row(experts_[0].weights.down, down * down_bytes);
          }
          kernels.gate_up(call.shape, e.weights, int64_t{begin - e.unit} * e.rows,
                          std::min(I, int64_t{stop - e.unit} * e.rows), e.group,
                          x + e.first * h_in,
                          kernels.pack_h ? plain + e.first * I : h + e.first * h_mid, mine, ahead);
          begin = stop;
        }
      });
      split_.wait(kGateUp);
      if (kernels.pack_h) {
        split_.run(kPackH, thread, n, at_once, [&](int32_t begin, int32_t end, int32_t) {
          for (; begin < end; ++begin) {
            const Packing some = packing_[begin];
            kernels.pack(plain + some.first * I, DType::f32, order_.data(), some.count, I,
                         h + some.first * h_mid);
          }
        });
        split_.wait(kPackH);
      }
      float* const sums = mine + scratch - (t1 - t0) * kRowsAtOnce;
      split_.run(kDown, thread, n, at_once, [&](int32_t first, int32_t last, int32_t then) {
        const int64_t begin = first * down_rows, end = std::min(H, last * down_rows);
        std::fill(sums, sums + (t1 - t0) * kRowsAtOnce, 0.0f);
        for (size_t j = 0; j < experts_.size(); ++j) {
          const Expert& e = experts_[j];
          const bool more = j + 1 < experts_.size();
          const void* ahead = more || then >= 0 ? row(experts_[more ? j + 1 : 0].weights.down,
                                                      (more ? first : then) * down_bytes)
                                                : nullptr;
          kernels.down(call.shape, e.weights, begin, end, e.group, h + e.first * h_mid,
                       local_.data() + e.first, weight_.data() + e.first, sums, kRowsAtOnce, mine,
                       ahead);
        }
        for (int64_t t = t0; t < t1; ++t)
          std::copy_n(sums + (t - t0) * kRowsAtOnce, end - begin, call.y + t * H + begin);
      });
      if (thread == 0) split_.wait(kDown);
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
    for (auto n = static_cast<int32_t>(order_.size()); n < kernels.block_tokens; ++n)
      order_.push_back(n);
    cursor_.assign(start_.begin(), start_.end() - 1);
    for (int64_t i = t0 * call.k; i < t1 * call.k; ++i) {
      const int64_t e = id(i);
      if (e < 0) continue;
      const int32_t to = cursor_[e]++;
      token_[to] = static_cast<int32_t>(i / call.k);
      local_[to] = static_cast<int32_t>(i / call.k - t0);
      weight_[to] = call.weights[i];
    }
    experts_.clear(), blocks_.clear(), packing_.clear();
    blocks_.reserve(pairs);  // groups point into it
    for (int64_t e = 0; e < call.experts; ++e) {
      const int32_t n = start_[e + 1] - start_[e];
      if (n == 0) continue;
      const int widest = n <= kernels.stream_tokens ? n : kernels.block_tokens;
      const int count = (n + widest - 1) / widest;
      const Block* blocks = blocks_.data() + blocks_.size();
      for (int32_t b = 0, first = 0; b < count; ++b) {
        const int32_t size = n / count + (b < n % count);
        packing_.push_back({start_[e] + first, size});
        blocks_.push_back({first, size});
        first += size;
      }
      experts_.push_back({call.expert(e), {blocks, count, n}, start_[e], 0, 0, 0, 0});
    }
  }

  // Runs of about the same time: an expert costs its bytes, or its arithmetic.
  void split_work(const ExpertKernels& kernels, int threads, int64_t intermediate,
                  int64_t down_units) {
    int32_t unit = 0;
    int64_t cost = 0;
    for (Expert& e : experts_) {
      e.rows = e.group.pairs > kernels.stream_tokens ? kernels.panel_rows : kStreamRows;
      e.unit = unit;
      unit = e.end = unit + static_cast<int32_t>((intermediate + e.rows - 1) / e.rows);
      cost = e.cost = cost + std::max(kernels.free_tokens, e.group.pairs);
    }
    const auto evenly = [&](int64_t units) {
      return [=](int t) { return static_cast<uint32_t>(units * t / threads); };
    };
    const auto packings = static_cast<int64_t>(packing_.size());
    split_.assign(kPack, threads, evenly(packings));
    split_.assign(kPackH, threads, evenly(packings));
    size_t at = 0;
    split_.assign(kGateUp, threads, [&](int t) -> uint32_t {
      const int64_t until = cost * t / threads;
      while (at < experts_.size() && experts_[at].cost <= until) ++at;
      if (at == experts_.size()) return unit;
      const Expert& e = experts_[at];
      const int64_t before = at ? experts_[at - 1].cost : 0;
      return e.unit + (e.end - e.unit) * (until - before) / (e.cost - before);
    });
    split_.assign(kDown, threads, evenly(down_units));
  }

  enum { kPack, kGateUp, kPackH, kDown };
  static constexpr int64_t kStreamRows = 8, kRowsAtOnce = 256;
  static constexpr int64_t kWorthAThread = 16384;  // multiply-adds that last as long as a wake-up

  std::mutex mutex_;
  ThreadPool pool_;
  std::vector<float> memory_;
  WorkSplit split_;
  std::vector<int32_t> start_, cursor_, token_, local_, order_;  // order_: 0, 1, 2, ...
  std::vector<float> weight_;
  std::vector<Expert> experts_;
  std::vector<Block> blocks_;
  std::vector<Packing> packing_;
};

}  // namespace spac
