// The verify operator on the CPU; see verify.h.
#include "verify.h"

#include <tuple>

#include "arguments.h"

namespace spac {
namespace {
void check_state(const char* name, const Tensor& t, ScalarType type, int64_t size) {
  check(t.is_cpu() && t.is_contiguous() && t.scalar_type() == type && t.dim() == 1 &&
            t.size(0) == size,
        "verify: ", name, ": expected a contiguous CPU tensor [", size, "], ",
        type == ScalarType::Int ? "int32" : "int64");
}

// ids [W, k] int32 or int64; the rest and the results as in spac.reference.verify.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> verify_cpu(
    const Tensor& ids, const Tensor& address, const Tensor& utility, const Tensor& bounds,
    const Tensor& counters, int64_t max_utility) {
  const int64_t experts = address.numel(), pairs = ids.numel();
  const ScalarType id_type = ids.scalar_type();
  check(ids.is_cpu() && ids.dim() == 2 && ids.is_contiguous() &&
            (id_type == ScalarType::Int || id_type == ScalarType::Long),
        "verify: ids: expected a contiguous CPU tensor [W, k], int32 or int64");
  check_state("address", address, ScalarType::Long, experts);
  check_state("utility", utility, ScalarType::Int, experts);
  check_state("bounds", bounds, ScalarType::Int, 2);
  check_state("counters", counters, ScalarType::Long, 4);

  const auto empty = [&](int64_t size) {
    return torch::stable::new_empty(ids, {size}, ScalarType::Int);
  };
  Tensor resident = torch::stable::new_empty(ids, {ids.size(0), ids.size(1)}, ScalarType::Int);
  Tensor cpu = torch::stable::new_empty(resident, {ids.size(0), ids.size(1)}, ScalarType::Int);
  Tensor counts = empty(experts), order = empty(pairs), offsets = empty(experts + 1);
  const int32_t* up_down = bounds.const_data_ptr<int32_t>();
  const VerifyState state{address.const_data_ptr<int64_t>(),
                          utility.mutable_data_ptr<int32_t>(),
                          up_down[0],
                          up_down[1],
                          static_cast<int32_t>(max_utility),
                          counters.mutable_data_ptr<int64_t>()};
  const VerifyResult result{
      resident.mutable_data_ptr<int32_t>(), cpu.mutable_data_ptr<int32_t>(),
      counts.mutable_data_ptr<int32_t>(), order.mutable_data_ptr<int32_t>(),
      offsets.mutable_data_ptr<int32_t>()};
  if (id_type == ScalarType::Int)
    verify(ids.const_data_ptr<int32_t>(), pairs, experts, state, result);
  else
    verify(ids.const_data_ptr<int64_t>(), pairs, experts, state, result);
  return {resident, cpu, counts, order, offsets};
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(spac, m) {
  m.def(
      "verify_cpu(Tensor ids, Tensor address, Tensor(a!) utility, Tensor bounds, "
      "Tensor(b!) counters, int max_utility) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(spac, CPU, m) {
  m.impl("verify_cpu", TORCH_BOX(&verify_cpu));
}
}  // namespace spac
