// Answers the windows of spac/handoff.py from a thread of its own: when the device has rung a layer's
// bell, the layer's rows are computed into pinned memory and its done flag is set. The Python
// program has no part in it.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "expert_ffn_run.h"

namespace spac {

inline constexpr int32_t kNow = INT32_MAX;  // a flag that nobody has to wait for

// Rows of one window, shared by all layers, and the flags and times of each layer.
struct Mailbox {
  int32_t *bell, *done;  // [layers]; bell: twice the window, and one if it has rows for the CPU
  const void* x;         // [tokens, hidden]
  DType x_dtype;
  const int32_t* ids;    // [tokens, k]
  const float* weights;  // [tokens, k]
  float* back;           // [tokens, hidden]
  int64_t* times;        // [layers, 2]: steady_clock ns of the last computation, 0: nothing to do
  int64_t k;
};

class Worker {
 public:
  // Called before a layer is computed; anything but 0 is a failure. Only tests have one.
  using Hook = int (*)(int64_t layer);

  // `eager`: never sleep during a window, for hosts whose cores wait for a GPU.
  Worker(Mailbox mailbox, bool eager) : mail_(mailbox), eager_(eager) {}
  ~Worker() {
    closing_.store(true);
    begun_.fetch_add(1);
    begun_.notify_one();
    if (thread_.joinable()) thread_.join();
  }

  // Layers in order, before start().
  void add_layer(const FfnCall& table) { layers_.push_back(table); }
  void start() {
    thread_ = without_signals([this] { serve(); });
  }

  // The device is about to run the next window, of `width` rows; returns its number, counted from 1.
  uint32_t begin(int64_t width, int threads, Hook hook) {
    const uint32_t n = begun_.load(std::memory_order_relaxed) + 1;
    windows_[n % kWindows] = {width, threads, hook};
    begun_.store(n, std::memory_order_release);
    begun_.notify_one();
    return n;
  }

  std::string error() const { return failed_.load(std::memory_order_acquire) ? error_ : ""; }

 private:
  struct Window {
    int64_t width;
    int threads;
    Hook hook;
  };
  static constexpr int kWindows = 64;  // a host is never so far ahead of the device

  static int64_t now() { return std::chrono::steady_clock::now().time_since_epoch().count(); }
  uint32_t bell(size_t layer) const {
    return static_cast<uint32_t>(__atomic_load_n(mail_.bell + layer, __ATOMIC_ACQUIRE));
  }

  void serve() {
    ExpertFfn& ffn = per_process<ExpertFfn>();
    try {
      for (uint32_t served = 0;;) {
        begun_.wait(served, std::memory_order_acquire);
        if (eager_) ffn.stay_awake(true);
        served = window(ffn, served + 1);
        if (begun_.load(std::memory_order_acquire) == served) ffn.stay_awake(false);
        if (closing_) break;
      }
    } catch (const std::exception& error) {
      error_ = error.what();
      failed_.store(true, std::memory_order_release);
      for (size_t layer = 0; layer < layers_.size(); ++layer)
        __atomic_store_n(mail_.done + layer, kNow, __ATOMIC_RELEASE);
    }
    ffn.stay_awake(false);
  }

  // Answers the window whose bells ring next, n or a later one if the device gave n up or needs no
  // more of it; returns which.
  uint32_t window(ExpertFfn& ffn, uint32_t n) {
    for (size_t layer = 0; layer < layers_.size();) {
      uint32_t rung = 0;
      await(ffn, [&] { return (rung = bell(layer)) / 2 >= n || bell(0) / 2 > n; });
      if (closing_) return n;
      if (const uint32_t first = bell(0); first / 2 > n) {
        rung = first;
        n = rung / 2;
        layer = 0;
      }
      int64_t* const times = mail_.times + 2 * layer;
      times[0] = times[1] = 0;
      if (rung % 2 == 1) answer(ffn, layer, windows_[n % kWindows], times);
      __atomic_store_n(mail_.done + layer, static_cast<int32_t>(n), __ATOMIC_RELEASE);
      ++layer;
    }
    return n;
  }

  // The device may have given the window up: then all threads sleep until the next one.
  template <class Ready>
  void await(ExpertFfn& ffn, Ready ready) const {
    using namespace std::chrono;
    const auto start = steady_clock::now();
    const auto patience = eager_ ? milliseconds(200) : milliseconds(2);
    bool patient = true;
    while (!ready() && !closing_) {
      if (!patient) {
        std::this_thread::sleep_for(microseconds(50));
      } else if (steady_clock::now() - start > patience) {
        patient = false;
        ffn.stay_awake(false);
      } else {
        for (int i = 0; i < 16 && !ready(); ++i) cpu_pause();
      }
    }
    if (!patient) ffn.stay_awake(eager_);
  }

  void answer(ExpertFfn& ffn, size_t layer, const Window& window, int64_t* times) {
    if (window.hook && window.hook(static_cast<int64_t>(layer)) != 0)
      throw std::runtime_error("it was told to fail");
    FfnCall call = layers_[layer];
    call.x = mail_.x;
    call.x_dtype = mail_.x_dtype;
    // A device that has given a late answer up writes new ones: they are looked at more than once.
    ids_.assign(mail_.ids, mail_.ids + window.width * mail_.k);
    call.ids = ids_.data();
    call.weights = mail_.weights;
    call.tokens = window.width;
    call.k = mail_.k;
    call.y = mail_.back;
    times[0] = now();
    ffn.run(call, expert_kernels(current_isa(), call.w_dtype, call.x_dtype), window.threads);
    times[1] = now();
  }

  const Mailbox mail_;
  const bool eager_;
  std::vector<FfnCall> layers_;
  std::vector<int32_t> ids_;  // of the layer that is computed
  Window windows_[kWindows] = {};
  std::atomic<uint32_t> begun_{0};
  std::atomic<bool> closing_{false}, failed_{false};
  std::string error_;
  std::thread thread_;
};

}  // namespace spac
