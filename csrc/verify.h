// One verify window of one layer on the CPU: the pairs split by residency and grouped, the utility
// updated. Bit for bit spac.reference.verify, whose docstring describes arguments and results.
#pragma once
#include <algorithm>
#include <cstdint>

namespace spac {

struct VerifyState {
  const int64_t* address;  // [E], 0 = not resident
  int32_t* utility;        // [E], updated
  int32_t up, down, max_utility;
  int64_t* counters;  // [4], added to: pairs, resident pairs, experts, resident experts
};

struct VerifyResult {
  int32_t *resident_ids, *cpu_ids;  // [pairs]
  int32_t* counts;                  // [E]
  int32_t* order;                   // [pairs]
  int32_t* offsets;                 // [E + 1]
};

template <class Id>
void verify(const Id* ids, int64_t pairs, int64_t experts, const VerifyState& s,
            const VerifyResult& out) {
  std::fill_n(out.counts, experts, 0);
  int64_t valid = 0, resident = 0;
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t e = ids[i];
    const bool known = e >= 0 && e < experts, here = known && s.address[e] != 0;
    out.resident_ids[i] = here ? static_cast<int32_t>(e) : -1;
    out.cpu_ids[i] = known && !here ? static_cast<int32_t>(e) : -1;
    if (known) ++out.counts[e];
    valid += known, resident += here;
  }
  int64_t chosen = 0, chosen_here = 0;
  int32_t end = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const int32_t n = out.counts[e], u = s.utility[e];
    s.utility[e] = std::clamp(u + (n - u >= s.up) - (u - n >= s.down), 0, s.max_utility);
    const bool here = s.address[e] != 0;
    chosen += n > 0, chosen_here += n > 0 && here;
    out.offsets[e] = end;
    end += here ? n : 0;
  }
  // Groups are filled from their ends, so that offsets come to lie at their starts again.
  out.offsets[experts] = end;
  std::fill_n(out.order, pairs, -1);
  for (int64_t e = 0; e < experts; ++e) out.offsets[e] = out.offsets[e + 1];
  for (int64_t i = pairs - 1; i >= 0; --i)
    if (const int32_t e = out.resident_ids[i]; e >= 0)
      out.order[--out.offsets[e]] = static_cast<int32_t>(i);
  s.counters[0] += valid, s.counters[1] += resident;
  s.counters[2] += chosen, s.counters[3] += chosen_here;
}

}  // namespace spac
