// Persistent workers. run(n, job) calls job(thread, n) on the caller, as thread 0, and on those of
// n - 1 workers that come before the caller is through: a job shares its work by WorkSplit and never
// waits for a thread, so a worker that sleeps or has lost its core delays nobody. Workers spin for a
// moment after a job, then sleep. A pool must never be destroyed (see per_process): at exit its
// workers sleep on memory that stays valid, and nothing has to be waited for.
#pragma once
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "isa.h"

namespace spac {

inline void cpu_pause() {
#ifdef SPAC_X86
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// Waits for ready(): spins, then gives the core away. The scheduler may put two threads on one core
// while another is free; the one with work would else have to wait for the end of a time slice.
template <class Ready>
void spin_until(Ready ready) {
  for (int i = 0; !ready(); ++i) {
    if (i < 512)
      cpu_pause();
    else
      std::this_thread::yield();
  }
}

// The T of this process. Threads do not survive fork(): a child gets a new T and leaves the old
// one, whose lock another thread of the parent may have held, alone.
template <class T>
T& per_process() {
  struct Owned {
    T value;
    const pid_t pid = getpid();
  };
  static std::atomic<Owned*> current{nullptr};
  Owned* owned = current.load(std::memory_order_acquire);
  while (!owned || owned->pid != getpid()) {
    auto fresh = std::make_unique<Owned>();
    if (current.compare_exchange_strong(owned, fresh.get(), std::memory_order_acq_rel))
      owned = fresh.release();
  }
  return owned->value;
}

// A thread that leaves all signals to the interpreter's threads.
template <class Work>
std::thread without_signals(Work work) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // a new thread inherits this mask
  try {
    std::thread thread(work);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return thread;
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
}

class ThreadPool {
 public:
  // One caller at a time. `job` must not throw.
  template <class Job>
  void run(int threads, Job job) {
    if (threads <= 1) return job(0, 1);
    while (workers_ < threads - 1) add_worker();
    call_ = [](void* context, int thread, int n) { (*static_cast<Job*>(context))(thread, n); };
    context_ = &job;
    threads_ = threads;
    const uint32_t round = round_.load(std::memory_order_relaxed) + 1;
    gate_.store(uint64_t{round} << 32 | kOpen, std::memory_order_release);
    round_.store(round, std::memory_order_release);
    round_.notify_all();
    job(0, threads);
    gate_.fetch_and(~kOpen, std::memory_order_relaxed);
    spin_until([&] { return static_cast<uint32_t>(gate_.load(std::memory_order_acquire)) == 0; });
  }

  // Between jobs that follow each other closely: workers that sleep take tens of microseconds to
  // come back.
  void stay_awake(bool awake) { awake_.store(awake, std::memory_order_relaxed); }

 private:
  static constexpr uint64_t kOpen = uint64_t{1} << 31;

  void add_worker() {
    const uint32_t seen = round_.load(std::memory_order_relaxed);
    without_signals([this, thread = workers_ + 1, seen] { work(thread, seen); }).detach();
    ++workers_;
  }

  // Inside while the job of this round lasts.
  bool enter(uint32_t round) {
    uint64_t gate = gate_.load(std::memory_order_relaxed);
    while (gate >> 32 == round && (gate & kOpen))
      if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acquire)) return true;
    return false;
  }

  void work(int thread, uint32_t seen) {
    for (;;) {
      const auto deadline = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
      uint32_t round;
      while ((round = round_.load(std::memory_order_acquire)) == seen) {
        for (int i = 0; i < 64 && round_.load(std::memory_order_relaxed) == seen; ++i) cpu_pause();
        if (std::chrono::steady_clock::now() <= deadline) continue;
        if (awake_.load(std::memory_order_relaxed))
          std::this_thread::yield();  // as in spin_until
        else
          round_.wait(seen, std::memory_order_acquire);
      }
      seen = round;
      if (!enter(round)) continue;
      if (thread < threads_) call_(context_, thread, threads_);
      gate_.fetch_sub(1, std::memory_order_release);
    }
  }

  int workers_ = 0;
  void (*call_)(void*, int, int) = nullptr;
  void* context_ = nullptr;
  int threads_ = 1;
  std::atomic<bool> awake_{false};
  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<uint64_t> gate_{0};  // round, then kOpen, then how many workers are inside
};

}  // namespace spac
