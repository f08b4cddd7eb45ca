// The work of a job in passes of numbered units. A thread has a run of units of its own in each pass,
// taken in order, so that it reads memory in order and knows what comes next: several at a time,
// then fewer, so that all threads end together. A thread that is through takes units from the ends
// of the others' runs. A pass is over when its units are computed,
// whoever did it.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "thread_pool.h"

namespace spac {

class WorkSplit {
 public:
  static constexpr int kPasses = 4;

  // Before a job. Thread t of n gets units [bound(t), bound(t + 1)) of `pass`; bound(0) = 0.
  template <class Bound>
  void assign(int pass, int n, Bound bound) {
    if (capacity_ < n) {
      lanes_ = std::make_unique<Lane[]>(n);
      capacity_ = n;
    }
    uint32_t begin = 0;
    for (int t = 0; t < n; ++t) {
      const uint32_t end = bound(t + 1);
      lanes_[t].left[pass].store({begin, end}, std::memory_order_relaxed);
      begin = end;
    }
    units_[pass] = begin;
    done_[pass].store(0, std::memory_order_relaxed);
  }

  // Computes units while there are any: work(begin, end, next) on at most `at_once` of them, where
  // `next` is the unit that this thread will probably take then, or -1.
  template <class Work>
  void run(int pass, int thread, int n, uint32_t at_once, Work work) {
    uint32_t count = 0;
    for (Units units; !(units = take(pass, thread, n, at_once)).empty();) {
      work(static_cast<int32_t>(units.begin), static_cast<int32_t>(units.end),
           first_of(pass, thread));
      count += units.end - units.begin;
    }
    if (count) done_[pass].fetch_add(count, std::memory_order_release);
  }

  // Until all units of `pass` are computed.
  void wait(int pass) const {
    spin_until([&] { return done_[pass].load(std::memory_order_acquire) == units_[pass]; });
  }

  // The next unit of this thread's own run, or -1.
  int32_t first_of(int pass, int thread) const {
    const Units left = lanes_[thread].left[pass].load(std::memory_order_relaxed);
    return left.empty() ? -1 : static_cast<int32_t>(left.begin);
  }

 private:
  struct alignas(8) Units {
    uint32_t begin, end;
    bool empty() const { return begin >= end; }
  };
  struct alignas(64) Lane {
    std::atomic<Units> left[kPasses];
  };

  Units take(int pass, int thread, int n, uint32_t at_once) {
    for (int i = 0; i < n; ++i) {
      std::atomic<Units>& lane = lanes_[(thread + i) % n].left[pass];
      Units left = lane.load(std::memory_order_relaxed);
      while (!left.empty()) {
        const uint32_t some = std::clamp((left.end - left.begin) / 4, 1u, at_once);
        const uint32_t cut = i == 0 ? left.begin + some : left.end - some;
        const Units mine = i == 0 ? Units{left.begin, cut} : Units{cut, left.end};
        const Units rest = i == 0 ? Units{cut, left.end} : Units{left.begin, cut};
        if (lane.compare_exchange_weak(left, rest, std::memory_order_relaxed)) return mine;
      }
    }
    return {0, 0};
  }

  std::unique_ptr<Lane[]> lanes_;
  int capacity_ = 0;
  uint32_t units_[kPasses] = {};
  alignas(64) std::atomic<uint32_t> done_[kPasses] = {};
};

}  // namespace spac
