// Many short jobs in two passes with changing thread counts: no unit is lost or computed twice, and
// what one pass writes the next may read. Some rounds follow a pause in which the workers fall
// asleep. For ThreadSanitizer, and without it for long runs. No torch.
#include <cstdio>
#include <cstdlib>

#include "thread_pool.h"
#include "work_split.h"

int main(int argc, char** argv) {
  const long rounds = argc > 1 ? std::atol(argv[1]) : 1000;
  constexpr int kUnits = 11;
  auto& pool = spac::per_process<spac::ThreadPool>();
  spac::WorkSplit split;
  long wrong = 0;
  for (long round = 0; round < rounds; ++round) {
    const int threads = 1 + static_cast<int>(round % 4), units = static_cast<int>(round % kUnits);
    long first[kUnits] = {}, second[kUnits] = {};
    const auto evenly = [&](int t) { return static_cast<uint32_t>(units * t / threads); };
    const auto to_the_last = [&](int t) { return static_cast<uint32_t>(t == threads ? units : 0); };
    split.assign(0, threads, evenly);
    if (round % 2)
      split.assign(1, threads, evenly);
    else
      split.assign(1, threads, to_the_last);
    if (round % 512 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
    if (round % 100000 == 0) pool.stay_awake(round % 200000 == 0);
    pool.run(threads, [&](int thread, int n) {
      split.run(0, thread, n, 3, [&](int begin, int end, int) {
        for (; begin < end; ++begin) first[begin] += round + begin;
      });
      split.wait(0);
      split.run(1, thread, n, 1, [&](int begin, int, int) {
        second[begin] += first[units - 1 - begin];
      });
      if (thread == 0) split.wait(1);
    });
    for (int u = 0; u < units; ++u) wrong += second[u] != round + units - 1 - u;
  }
  std::printf("%ld rounds, %ld wrong\n", rounds, wrong);
  return wrong != 0;
}
