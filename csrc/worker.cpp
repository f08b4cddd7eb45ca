// The operators of the worker and its flags; see worker.h.
#include "worker.h"

#include <memory>
#include <unordered_map>

#include "arguments.h"

namespace spac {
namespace {
struct Owned {
  std::vector<Tensor> tensors;  // the worker points into them
  int64_t hidden;
  std::unique_ptr<Worker> worker;
};

// Never destroyed: a worker that nobody has stopped goes on until the process has ended.
struct Registry {
  std::mutex mutex;
  std::unordered_map<int64_t, Owned> workers;
  int64_t last = 0;
};
Registry& registry() {
  return per_process<Registry>();
}

Owned& find(int64_t id) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  const auto found = registry().workers.find(id);
  check(found != registry().workers.end(), "worker: there is no worker ", id);
  return found->second;
}

void check_memory(const char* name, const Tensor& t, ScalarType type, int64_t rows,
                  int64_t columns) {
  check(t.is_cpu() && t.is_contiguous() && t.scalar_type() == type && t.dim() == 2 &&
            t.size(0) == rows && t.size(1) == columns,
        "worker: ", name, ": expected a contiguous CPU tensor [", rows, ", ", columns,
        "] of its type");
}

int64_t worker_new(const Tensor& flags, const Tensor& x, const Tensor& ids, const Tensor& weights,
                   const Tensor& back, const Tensor& times, bool eager) {
  check_tensor("x", x, 2);
  check_tensor("ids", ids, 2);
  check_tensor("flags", flags, 2);
  const int64_t tokens = x.size(0), hidden = x.size(1), k = ids.size(1), layers = flags.size(1);
  check_memory("flags", flags, ScalarType::Int, 2, layers);
  check_memory("ids", ids, ScalarType::Int, tokens, k);
  check_memory("weights", weights, ScalarType::Float, tokens, k);
  check_memory("back", back, ScalarType::Float, tokens, hidden);
  check_memory("times", times, ScalarType::Long, layers, 2);
  int32_t* const bell = flags.mutable_data_ptr<int32_t>();
  const Mailbox mail{bell,
                     bell + layers,
                     x.const_data_ptr(),
                     float_type("x", x.scalar_type()),
                     ids.const_data_ptr<int32_t>(),
                     weights.const_data_ptr<float>(),
                     back.mutable_data_ptr<float>(),
                     times.mutable_data_ptr<int64_t>(),
                     k};
  Registry& all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.workers[++all.last] = {
      {flags, x, ids, weights, back, times}, hidden, std::make_unique<Worker>(mail, eager)};
  return all.last;
}

void worker_add_layer(int64_t id, const Tensor& address, ScalarType dtype, int64_t intermediate,
                      int64_t gate_stride, int64_t up_offset, int64_t down_offset,
                      int64_t down_skew, int64_t down_stride, bool bias,
                      int64_t gate_up_bias_offset, int64_t gate_up_bias_skew,
                      int64_t down_bias_offset, int64_t down_bias_skew, int64_t bias_stride,
                      int64_t bias_up_offset, StringHandle activation, double alpha,
                      double limit, StringHandle form, int64_t group,
                      int64_t gate_up_scale_offset, int64_t down_scale_offset) {
  Owned& owned = find(id);
  owned.worker->add_layer(describe_table(address, owned.hidden, dtype, intermediate, gate_stride,
                                         up_offset, down_offset, down_skew, down_stride, bias,
                                         gate_up_bias_offset, gate_up_bias_skew, down_bias_offset,
                                         down_bias_skew, bias_stride, bias_up_offset, activation,
                                         alpha, limit, form, group, gate_up_scale_offset,
                                         down_scale_offset));
  owned.tensors.push_back(address);
}

void worker_start(int64_t id) {
  find(id).worker->start();
}

int64_t worker_begin(int64_t id, int64_t width, int64_t hook) {
  return find(id).worker->begin(width, current_threads(), reinterpret_cast<Worker::Hook>(hook));
}

std::string worker_error(int64_t id) {
  return find(id).worker->error();
}

// Waits for its thread. A worker that is stopped already is no error.
void worker_stop(int64_t id) {
  Registry& all = registry();
  std::unique_lock<std::mutex> lock(all.mutex);
  auto stopped = all.workers.extract(id);
  lock.unlock();  // its last layer may take a while
}

// Waits until flags[index] >= value. False if that took more than `seconds`.
bool wait_flag(const Tensor& flags, int64_t index, int64_t value, double seconds) {
  check(flags.is_cpu() && flags.is_contiguous() && flags.scalar_type() == ScalarType::Int &&
            index >= 0 && index < flags.numel(),
        "wait_flag: expected a contiguous int32 CPU tensor and an index inside it");
  const int32_t* const flag = flags.const_data_ptr<int32_t>() + index;
  using Clock = std::chrono::steady_clock;
  const auto limit = Clock::now() + std::chrono::duration<double>(seconds);
  for (int i = 0; __atomic_load_n(flag, __ATOMIC_ACQUIRE) < value; ++i) {
    if (Clock::now() > limit) return false;
    if (i < 4096)
      cpu_pause();
    else
      std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
  return true;
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(spac, m) {
  m.def(
      "worker_new(Tensor flags, Tensor x, Tensor ids, Tensor weights, Tensor back, Tensor times, "
      "bool eager) -> int");
  m.def("worker_add_layer(int worker, " SPAC_TABLE_SCHEMA ") -> ()");
  m.def("worker_start(int worker) -> ()");
  m.def("worker_begin(int worker, int width, int hook) -> int");
  m.def("worker_error(int worker) -> str");
  m.def("worker_stop(int worker) -> ()");
  m.def("wait_flag(Tensor flags, int index, int value, float seconds) -> bool");
}
STABLE_TORCH_LIBRARY_IMPL(spac, CompositeExplicitAutograd, m) {
  m.impl("worker_new", TORCH_BOX(&worker_new));
  m.impl("worker_add_layer", TORCH_BOX(&worker_add_layer));
  m.impl("worker_start", TORCH_BOX(&worker_start));
  m.impl("worker_begin", TORCH_BOX(&worker_begin));
  m.impl("worker_error", TORCH_BOX(&worker_error));
  m.impl("worker_stop", TORCH_BOX(&worker_stop));
  m.impl("wait_flag", TORCH_BOX(&wait_flag));
}
}  // namespace spac
