// Registers the C++ operators with torch, through its stable ABI, and checks their arguments.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "expert_ffn_run.h"

namespace spac {
namespace {
inline std::string text(const std::string& s) {
  return s;
}
inline std::string text(int64_t n) {
  return std::to_string(n);
}

// STD_TORCH_CHECK writes its line number through an ostream, which crashes where the toolchain links
// libstdc++ into the extension while libtorch uses the shared one.
template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (!ok) throw std::runtime_error((text(parts) + ...));
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::atomic<int64_t> cpu_threads{0};

DType float_type(const char* name, ScalarType type) {
  if (type == ScalarType::BFloat16) return DType::bf16;
  if (type == ScalarType::Half) return DType::f16;
  check(type == ScalarType::Float, "expert_ffn_cpu: ", name,
        ": expected bfloat16, float16 or float32");
  return DType::f32;
}

Activation activation_from(const std::string& name) {
  const char* names[] = {"silu", "gelu", "gelu_tanh", "relu", "swiglu_clamp"};
  for (int i = 0; i < 5; ++i)
    if (name == names[i]) return static_cast<Activation>(i);
  throw std::runtime_error(
      "expert_ffn_cpu: activation: expected silu, gelu, gelu_tanh, relu or swiglu_clamp, got '" +
      name + "'");
}

void check_tensor(const char* name, const Tensor& t, int64_t dim) {
  check(t.is_cpu() && t.dim() == dim && t.is_contiguous(), "expert_ffn_cpu: ", name,
        ": expected a contiguous CPU tensor of ", dim, " dimension(s), got ", t.dim(),
        t.is_cpu() ? "" : " on another device",
        t.is_contiguous() ? "" : ", not contiguous");
}

int current_threads() {
  const int64_t wanted = cpu_threads.load();
  return static_cast<int>(wanted > 0 ? wanted : torch::stable::get_num_threads());
}

Tensor expert_ffn_cpu(const Tensor& x, const Tensor& ids, const Tensor& weights,
                      const Tensor& address, ScalarType dtype, int64_t intermediate,
                      int64_t gate_stride, int64_t up_offset, int64_t down_offset,
                      int64_t down_skew, int64_t down_stride, bool bias,
                      int64_t gate_up_bias_offset, int64_t gate_up_bias_skew,
                      int64_t down_bias_offset, int64_t down_bias_skew, int64_t bias_stride,
                      int64_t bias_up_offset, const std::string& activation, double alpha,
                      double limit) {
  check_tensor("x", x, 2);
  check_tensor("ids", ids, 2);
  check_tensor("weights", weights, 2);
  check_tensor("address", address, 1);
  const int64_t tokens = x.size(0), hidden = x.size(1), k = ids.size(1);
  check(ids.size(0) == tokens && weights.size(0) == tokens && weights.size(1) == k,
        "expert_ffn_cpu: ids and weights: expected [", tokens, ", k] both, got [",
        ids.size(0), ", ", k, "] and [", weights.size(0), ", ", weights.size(1), "]");
  const ScalarType id_type = ids.scalar_type();
  check(id_type == ScalarType::Int || id_type == ScalarType::Long,
        "expert_ffn_cpu: ids: expected int32 or int64");
  check(weights.scalar_type() == ScalarType::Float,
        "expert_ffn_cpu: weights: expected float32");
  check(address.scalar_type() == ScalarType::Long,
        "expert_ffn_cpu: address: expected int64");
  check(
      hidden > 0 && intermediate > 0 && hidden <= INT32_MAX && intermediate <= INT32_MAX,
      "expert_ffn_cpu: expected hidden and intermediate in 1..2^31-1, got ", hidden, " and ",
      intermediate);

  Tensor y = torch::stable::new_empty(x, {tokens, hidden}, ScalarType::Float);
  FfnCall call{};
  call.shape = {hidden,
                intermediate,
                gate_stride,
                up_offset,
                down_stride,
                bias,
                bias_stride,
                bias_up_offset,
                activation_from(activation),
                static_cast<float>(alpha),
                static_cast<float>(limit)};
  call.x_dtype = float_type("x", x.scalar_type());
  call.w_dtype = float_type("dtype", dtype);
  call.x = x.const_data_ptr();
  call.ids = ids.const_data_ptr();
  call.ids_are_64 = id_type == ScalarType::Long;
  call.weights = weights.const_data_ptr<float>();
  call.address = address.const_data_ptr<int64_t>();
  call.tokens = tokens;
  call.k = k;
  call.experts = address.size(0);
  call.down_offset = down_offset;
  call.down_skew = down_skew;
  call.gate_up_bias_offset = gate_up_bias_offset;
  call.gate_up_bias_skew = gate_up_bias_skew;
  call.down_bias_offset = down_bias_offset;
  call.down_bias_skew = down_bias_skew;
  call.y = y.mutable_data_ptr<float>();

  const ExpertKernels& kernels = expert_kernels(current_isa(), call.w_dtype);
  per_process<ExpertFfn>().run(call, kernels, current_threads());
  return y;
}

// Reads a tensor once, shared by all threads; returns a checksum.
int64_t cpu_read(const Tensor& data) {
  check(data.is_cpu() && data.is_contiguous(),
        "cpu_read: expected a contiguous CPU tensor");
  const char* begin = static_cast<const char*>(data.const_data_ptr());
  const size_t bytes = data.numel() * data.element_size();
  const CpuPeak& peak = cpu_peak(current_isa());
  std::atomic<uint64_t> sum{0};
  per_process<ExpertFfn>().run_job(current_threads(), [&](int thread, int n) {
    sum += peak.read_memory(begin + bytes / n * thread, bytes / n);
  });
  return static_cast<int64_t>(sum.load());
}

// Multiplies and adds on all threads; returns how many floating-point operations that were.
int64_t cpu_multiply_add(int64_t steps) {
  const CpuPeak& peak = cpu_peak(current_isa());
  const int threads = current_threads();
  std::atomic<int> done{0};
  per_process<ExpertFfn>().run_job(threads, [&](int, int) {
    done += peak.multiply_add(steps) >=
            0;  // sums grow from 0 up: always true, but not for the compiler
  });
  return done.load() * steps * peak.flops_per_step;
}

// Waits until flags[index] >= value: spins for a moment, then sleeps between looks, longer and
// longer. False if that took more than `seconds`. Another thread, or a GPU, writes the flags.
bool wait_flag(const Tensor& flags, int64_t index, int64_t value, double seconds) {
  check(flags.is_cpu() && flags.is_contiguous() && flags.scalar_type() == ScalarType::Int &&
            index >= 0 && index < flags.numel(),
        "wait_flag: expected a contiguous int32 CPU tensor and an index inside it");
  const int32_t* flag = flags.const_data_ptr<int32_t>() + index;
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  const auto limit = std::chrono::duration<double>(seconds);
  while (__atomic_load_n(flag, __ATOMIC_ACQUIRE) < value) {
    const auto waited = Clock::now() - start;
    if (waited > limit) return false;
    if (waited < std::chrono::milliseconds(2))
      for (int i = 0; i < 32; ++i) cpu_pause();
    else
      std::this_thread::sleep_for(
          std::chrono::microseconds(waited < std::chrono::milliseconds(200) ? 50 : 1000));
  }
  return true;
}

std::string cpu_isa() {
  return kIsaNames[static_cast<int>(current_isa())];
}

void set_cpu_isa(const std::string& name) {
  set_isa(name);
}

void set_cpu_threads(int64_t threads) {
  check(threads >= 0 && threads <= 1024,
        "set_cpu_threads: expected 1..1024, or 0 for torch.get_num_threads(), got ",
        threads);
  cpu_threads.store(threads);
}
}  // namespace

STABLE_TORCH_LIBRARY(spac, m) {
  m.def(
      "expert_ffn_cpu(Tensor x, Tensor ids, Tensor weights, Tensor address, ScalarType dtype, "
      "int intermediate, int gate_stride, int up_offset, int down_offset, int down_skew, "
      "int down_stride, bool bias, int gate_up_bias_offset, int gate_up_bias_skew, "
      "int down_bias_offset, int down_bias_skew, int bias_stride, int bias_up_offset, "
      "str activation, float alpha, float limit) -> Tensor");
  m.def("cpu_read(Tensor data) -> int");
  m.def("cpu_multiply_add(int steps) -> int");
  m.def("wait_flag(Tensor flags, int index, int value, float seconds) -> bool");
  m.def("cpu_isa() -> str");
  m.def("set_cpu_isa(str name) -> ()");
  m.def("set_cpu_threads(int threads) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(spac, CPU, m) {
  m.impl("expert_ffn_cpu", TORCH_BOX(&expert_ffn_cpu));
  m.impl("cpu_read", TORCH_BOX(&cpu_read));
  m.impl("wait_flag", TORCH_BOX(&wait_flag));
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
