// Persistent workers. run(n, job) calls job(thread, n) on n threads, the caller being thread 0, and
// returns when all are done. Workers spin for a moment after a job, then sleep. A pool must never
// be destroyed (see per_process): at exit its workers sleep on memory that stays valid, and nothing
// has to be waited for.
#pragma once
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
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

// Waits for ready(): spins, then gives the core away, for machines with more threads than cores.
template <class Ready>
void spin_until(Ready ready) {
  for (int i = 0; !ready(); ++i) {
    if (i < 4096)
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
    while (static_cast<int>(workers_.size()) < threads - 1) add_worker();
    call_ = [](void* context, int thread, int n) { (*static_cast<Job*>(context))(thread, n); };
    context_ = &job;
    threads_ = threads;
    for (int i = 0; i < threads - 1; ++i) {
      workers_[i]->turn.fetch_add(1, std::memory_order_release);
      workers_[i]->turn.notify_one();
    }
    job(0, threads);
    barrier(threads);
  }

  // Between jobs that follow each other closely: workers that sleep take tens of microseconds to
  // come back.
  void stay_awake(bool awake) { awake_.store(awake, std::memory_order_relaxed); }

  // All n threads of the running job wait here for each other.
  void barrier(int n) {
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == n) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
    } else {
      spin_until([&] { return round_.load(std::memory_order_acquire) != round; });
    }
  }

 private:
  struct alignas(64) Worker {
    std::atomic<uint32_t> turn{0};
  };

  void add_worker() {
    const int thread = static_cast<int>(workers_.size()) + 1;
    auto worker = std::make_unique<Worker>();
    without_signals([this, self = worker.get(), thread] { work(self, thread); }).detach();
    workers_.push_back(std::move(worker));
  }

  void work(Worker* self, int thread) {
    for (uint32_t seen = 0;; ++seen) {
      const auto deadline = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
      while (self->turn.load(std::memory_order_acquire) == seen) {
        for (int i = 0; i < 64 && self->turn.load(std::memory_order_relaxed) == seen; ++i)
          cpu_pause();
        if (std::chrono::steady_clock::now() > deadline &&
            !awake_.load(std::memory_order_relaxed))
          self->turn.wait(seen, std::memory_order_acquire);
      }
      const int n = threads_;
      call_(context_, thread, n);
      barrier(n);  // after it the next run() may already be changing threads_
    }
  }

  std::vector<std::unique_ptr<Worker>> workers_;
  void (*call_)(void*, int, int) = nullptr;
  void* context_ = nullptr;
  int threads_ = 1;
  std::atomic<bool> awake_{false};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
};

}  // namespace spac
