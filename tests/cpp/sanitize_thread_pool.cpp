// Many short jobs with barriers and changing thread counts, for ThreadSanitizer: no answer is lost
// or doubled, and what one pass writes the next may read. No torch.
#include <cstdio>
#include <cstdlib>

#include "thread_pool.h"

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 1000;
  auto& pool = spac::per_process<spac::ThreadPool>();
  long wrong = 0;
  for (int round = 0; round < rounds; ++round) {
    const int threads = 1 + round % 4;
    int first[4] = {}, second[4] = {};
    pool.run(threads, [&](int thread, int n) {
      first[thread] += round + thread;
      pool.barrier(n);
      second[thread] += first[(thread + 1) % n];
    });
    for (int t = 0; t < threads; ++t) wrong += second[t] != round + (t + 1) % threads;
  }
  std::printf("%d rounds, %ld wrong\n", rounds, wrong);
  return wrong != 0;
}
