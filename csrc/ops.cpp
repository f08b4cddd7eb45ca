// Registers the C++ operators with torch, through its stable ABI, and checks their arguments.
#include <Python.h>

#include "arguments.h"

namespace spac {
namespace {
std::atomic<int64_t> cpu_threads{0};

Tensor expert_ffn_cpu(const Tensor& x, const Tensor& ids, const Tensor& weights,
                      const Tensor& address, ScalarType dtype, int64_t intermediate,
                      int64_t gate_stride, int64_t up_offset, int64_t down_offset,
                      int64_t down_skew, int64_t down_stride, bool bias,
                      int64_t gate_up_bias_offset, int64_t gate_up_bias_skew,
                      int64_t down_bias_offset, int64_t down_bias_skew, int64_t bias_stride,
                      int64_t bias_up_offset, StringHandle activation, double alpha,
                      double limit, StringHandle form, int64_t group,
                      int64_t gate_up_scale_offset, int64_t down_scale_offset) {
  check_tensor("x", x, 2);
  check_tensor("ids", ids, 2);
  check_tensor("weights", weights, 2);
  const int64_t tokens = x.size(0), hidden = x.size(1), k = ids.size(1);
  check(ids.size(0) == tokens && weights.size(0) == tokens && weights.size(1) == k,
        "expert_ffn_cpu: ids and weights: expected [", tokens, ", k] both, got [",
        ids.size(0), ", ", k, "] and [", weights.size(0), ", ", weights.size(1), "]");
  const ScalarType id_type = ids.scalar_type();
  check(id_type == ScalarType::Int || id_type == ScalarType::Long,
        "expert_ffn_cpu: ids: expected int32 or int64");
  check(weights.scalar_type() == ScalarType::Float,
        "expert_ffn_cpu: weights: expected float32");

  Tensor y = torch::stable::new_empty(x, {tokens, hidden}, ScalarType::Float);
  FfnCall call = describe_table(address, hidden, dtype, intermediate, gate_stride, up_offset,
                                down_offset, down_skew, down_stride, bias, gate_up_bias_offset,
                                gate_up_bias_skew, down_bias_offset, down_bias_skew, bias_stride,
                                bias_up_offset, activation, alpha, limit, form, group,
                                gate_up_scale_offset, down_scale_offset);
  call.x_dtype = float_type("x", x.scalar_type());
  call.x = x.const_data_ptr();
  call.ids = ids.const_data_ptr();
  call.ids_are_64 = id_type == ScalarType::Long;
  call.weights = weights.const_data_ptr<float>();
  call.tokens = tokens;
  call.k = k;
  call.y = y.mutable_data_ptr<float>();

  const ExpertKernels& kernels = expert_kernels(current_isa(), call.w_dtype, call.x_dtype);
  per_process<ExpertFfn>().run(call, kernels, current_threads());
  return y;
}

// Reads a tensor once, shared by all threads; returns a checksum.
int64_t cpu_read(const Tensor& data) {
  check(data.is_cpu() && data.is_contiguous(),
        "cpu_read: expected a contiguous CPU tensor");
  const char* begin = static_cast<const char*>(data.const_data_ptr());
  const int64_t bytes = data.numel() * data.element_size(), piece = 1 << 20;
  const CpuPeak& peak = cpu_peak(current_isa());
  std::atomic<uint64_t> sum{0};
  per_process<ExpertFfn>().run_job(
      current_threads(), (bytes + piece - 1) / piece, [&](int64_t unit) {
        sum += peak.read_memory(begin + unit * piece, std::min(piece, bytes - unit * piece));
      });
  return static_cast<int64_t>(sum.load());
}

// Multiplies and adds on all threads, each about `steps` times; returns how many floating-point
// operations that were.
int64_t cpu_multiply_add(int64_t steps) {
  const CpuPeak& peak = cpu_peak(current_isa());
  const int threads = current_threads();
  const int64_t parts = 8;
  std::atomic<int64_t> done{0};
  per_process<ExpertFfn>().run_job(threads, parts * threads, [&](int64_t) {
    done += peak.multiply_add(steps / parts) >=
            0;  // sums grow from 0 up: always true, but not for the compiler
  });
  return done.load() * (steps / parts) * peak.flops_per_step;
}

std::string cpu_isa() {
  return kIsaNames[static_cast<int>(current_isa())];
}

void set_cpu_isa(StringHandle name) {
  set_isa(take(name));
}

void set_cpu_threads(int64_t threads) {
  check(threads >= 0 && threads <= 1024,
        "set_cpu_threads: expected 1..1024, or 0 for torch.get_num_threads(), got ",
        threads);
  cpu_threads.store(threads);
}
}  // namespace

int current_threads() {
  const int64_t wanted = cpu_threads.load();
  return static_cast<int>(wanted > 0 ? wanted : torch::stable::get_num_threads());
}

STABLE_TORCH_LIBRARY(spac, m) {
  m.def("expert_ffn_cpu(Tensor x, Tensor ids, Tensor weights, " SPAC_TABLE_SCHEMA ") -> Tensor");
  m.def("cpu_read(Tensor data) -> int");
  m.def("cpu_multiply_add(int steps) -> int");
  m.def("cpu_isa() -> str");
  m.def("set_cpu_isa(str name) -> ()");
  m.def("set_cpu_threads(int threads) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(spac, CPU, m) {
  m.impl("expert_ffn_cpu", TORCH_BOX(&expert_ffn_cpu));
  m.impl("cpu_read", TORCH_BOX(&cpu_read));
}
STABLE_TORCH_LIBRARY_IMPL(spac, CompositeExplicitAutograd, m) {
  m.impl("cpu_multiply_add", TORCH_BOX(&cpu_multiply_add));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("set_cpu_isa", TORCH_BOX(&set_cpu_isa));
  m.impl("set_cpu_threads", TORCH_BOX(&set_cpu_threads));
}
}  // namespace spac

PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef def = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&def);
}
