// Checks and conversions of the arguments of the C++ operators, which come through torch's stable ABI.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <stdexcept>
#include <string>

#include "expert_ffn_run.h"

namespace spac {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int current_threads();  // of the expert FFN, for the calling thread

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

// A string argument, of which operators take the handle: torch's own conversion to std::string (2.10
// to 2.13) allocates one more that nobody frees, at every call.
inline std::string take(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  torch_string_length(handle, &length);
  torch_string_c_str(handle, &data);
  std::string copy(data, length);
  torch_delete_string(handle);
  return copy;
}

inline DType float_type(const char* name, ScalarType type) {
  if (type == ScalarType::BFloat16) return DType::bf16;
  if (type == ScalarType::Half) return DType::f16;
  check(type == ScalarType::Float, "expert_ffn_cpu: ", name,
        ": expected bfloat16, float16 or float32");
  return DType::f32;
}

inline DType weight_type(const std::string& form, int64_t group, DType plain, int64_t hidden,
                         int64_t intermediate) {
  if (form == "float") return plain;
  if (form == "int8") return DType::i8;
  check(form == "int4" && (group == 32 || group == 128),
        "expert_ffn_cpu: form: expected float, int8, or int4 in groups of 32 or 128, got '", form,
        "' and group ", group);
  check(hidden % group == 0 && intermediate % group == 0,
        "expert_ffn_cpu: form int4: expected hidden and intermediate in whole groups of ", group,
        ", got ", hidden, " and ", intermediate);
  return group == 32 ? DType::i4_32 : DType::i4_128;
}

inline Activation activation_from(const std::string& name) {
  const char* names[] = {"silu", "gelu", "gelu_tanh", "relu", "swiglu_clamp"};
  for (int i = 0; i < 5; ++i)
    if (name == names[i]) return static_cast<Activation>(i);
  throw std::runtime_error(
      "expert_ffn_cpu: activation: expected silu, gelu, gelu_tanh, relu or swiglu_clamp, got '" +
      name + "'");
}

inline void check_tensor(const char* name, const Tensor& t, int64_t dim) {
  check(t.is_cpu() && t.dim() == dim && t.is_contiguous(), "expert_ffn_cpu: ", name,
        ": expected a contiguous CPU tensor of ", dim, " dimension(s), got ", t.dim(),
        t.is_cpu() ? "" : " on another device",
        t.is_contiguous() ? "" : ", not contiguous");
}

// The weights of a layer as spac.layout.ExpertTable describes them; pairs and results are not set.
inline FfnCall describe_table(const Tensor& address, int64_t hidden, ScalarType dtype,
                              int64_t intermediate, int64_t gate_stride, int64_t up_offset,
                              int64_t down_offset, int64_t down_skew, int64_t down_stride,
                              bool bias, int64_t gate_up_bias_offset, int64_t gate_up_bias_skew,
                              int64_t down_bias_offset, int64_t down_bias_skew,
                              int64_t bias_stride, int64_t bias_up_offset,
                              StringHandle activation, double alpha, double limit,
                              StringHandle form, int64_t group,
                              int64_t gate_up_scale_offset, int64_t down_scale_offset) {
  const std::string activation_name = take(activation), form_name = take(form);
  check_tensor("address", address, 1);
  check(address.scalar_type() == ScalarType::Long, "expert_ffn_cpu: address: expected int64");
  check(hidden > 0 && intermediate > 0 && hidden <= INT32_MAX && intermediate <= INT32_MAX,
        "expert_ffn_cpu: expected hidden and intermediate in 1..2^31-1, got ", hidden, " and ",
        intermediate);
  FfnCall call{};
  call.shape = {hidden,
                intermediate,
                gate_stride,
                up_offset,
                down_stride,
                bias,
                bias_stride,
                bias_up_offset,
                activation_from(activation_name),
                static_cast<float>(alpha),
                static_cast<float>(limit),
                float_type("dtype", dtype)};
  call.w_dtype = weight_type(form_name, group, call.shape.bias_type, hidden, intermediate);
  call.gate_up_scale_offset = gate_up_scale_offset;
  call.down_scale_offset = down_scale_offset;
  call.address = address.const_data_ptr<int64_t>();
  call.experts = address.size(0);
  call.down_offset = down_offset;
  call.down_skew = down_skew;
  call.gate_up_bias_offset = gate_up_bias_offset;
  call.gate_up_bias_skew = gate_up_bias_skew;
  call.down_bias_offset = down_bias_offset;
  call.down_bias_skew = down_bias_skew;
  return call;
}

// Of the schemas that describe a table.
#define SPAC_TABLE_SCHEMA                                                              \
  "Tensor address, ScalarType dtype, "                                                 \
  "int intermediate, int gate_stride, int up_offset, int down_offset, int down_skew, " \
  "int down_stride, bool bias, int gate_up_bias_offset, int gate_up_bias_skew, "       \
  "int down_bias_offset, int down_bias_skew, int bias_stride, int bias_up_offset, "    \
  "str activation, float alpha, float limit, str form=\"float\", int group=0, "        \
  "int gate_up_scale_offset=0, int down_scale_offset=0"

}  // namespace spac
