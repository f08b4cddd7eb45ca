// The expert FFN on the CPU: types shared by the driver and the microkernels of every ISA.
// y[t] += w * down_e @ (act(gate_e @ x[t]) * up_e @ x[t]) over the pairs (t, e, w); fp32 sums.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "isa.h"

namespace spac {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
// Quantised as spac/quantize.py says: one fp32 scale a row, or one fp16 scale a group of weights.
struct i8 {
  int8_t q;
};
struct i4 {  // two weights
  uint8_t q;
};
// Those from i8 on are of weights only.
enum class DType { bf16, f16, f32, i8, i4_32, i4_128 };
enum class Activation { silu, gelu, gelu_tanh, relu, swiglu_clamp };

inline float from_bits(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}
inline float to_float(float v) {
  return v;
}
inline float to_float(bf16 v) {
  return from_bits(static_cast<uint32_t>(v.bits) << 16);
}
inline float to_float(i8 v) {
  return v.q;
}
inline float to_float(f16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16, rest = v.bits & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest << 13));  // inf, nan
  return from_bits(sign | 0x3f800000) * (from_bits(rest << 13) * 0x1p112f);
}

inline float float_at(const void* p, DType type, int64_t i) {
  if (type == DType::bf16) return to_float(static_cast<const bf16*>(p)[i]);
  if (type == DType::f16) return to_float(static_cast<const f16*>(p)[i]);
  return static_cast<const float*>(p)[i];
}
// Of what strides count: two weights of int4.
inline int64_t unit_bytes(DType type) {
  return type == DType::f32 ? 4 : type == DType::bf16 || type == DType::f16 ? 2 : 1;
}

// One layer, as ExpertTable (spac/layout.py) describes it. Strides and *_offset in elements.
struct FfnShape {
  int64_t hidden, intermediate;
  int64_t gate_stride, up_offset, down_stride;
  bool bias;
  int64_t bias_stride, bias_up_offset;
  Activation activation;
  float alpha, limit;
  DType bias_type = DType::f32;
};

// Where the weights of one expert start; biases and scales may be null. The scales of gate and up
// lie in the order of their biases.
struct ExpertWeights {
  const void *gate, *down, *gate_bias, *down_bias;
  const void *gate_scale = nullptr, *down_scale = nullptr;
};

// `count` pairs of one expert that a tile computes together, from pair `first` of that expert.
struct Block {
  int32_t first, count;
};

// Token rows ("x" of a projection with K inputs) are packed per block as [K / 2VL][2][count][VL]
// floats, zero past K; which elements half 0 and half 1 hold depends on the weight dtype. Other kernels
// pack integers. A block starts at float `first * packed(K)`.
struct Group {
  const Block* blocks;
  int32_t num_blocks;
  int32_t pairs;  // sum of the counts
};

// The microkernels of one ISA for one weight dtype. Threads call them on disjoint output rows.
// Every dot product adds its terms in one fixed order, whatever rows or tokens are computed beside
// it.
struct ExpertKernels {
  int stream_tokens;  // an expert with at most this many pairs reads its rows as they lie
  int block_tokens;   // widest block beyond that
  int panel_rows;     // rows taken together then, a multiple of 8
  int free_tokens;    // pairs of an expert that cost no more than its bytes
  int64_t (*packed)(int64_t k);  // floats of a packed token of k elements
  bool pack_h;  // h is written as it is, [pairs, intermediate], and then packed as x is

  // Packs rows token[0..count) of x [*, k] into one block.
  void (*pack)(const void* x, DType x_dtype, const int32_t* token, int count, int64_t k,
               float* out);

  // h[:, begin..end) = act(gate @ x) * up @ x, in packed form or, with pack_h, as it is. `next` is the first weight
  // row that this thread will want afterwards (a prefetch hint, may be null).
  void (*gate_up)(const FfnShape&, const ExpertWeights&, int64_t begin, int64_t end, const Group&,
                  const float* x, float* h, float* scratch, const void* next);

  // y[token[p], 0..end - begin) += weight[p] * (down[begin..end) @ h[p] + bias).
  void (*down)(const FfnShape&, const ExpertWeights&, int64_t begin, int64_t end, const Group&,
               const float* h, const int32_t* token, const float* weight, float* y,
               int64_t y_stride, float* scratch, const void* next);

  // Floats of scratch per thread for calls of at most `rows` rows and `pairs` pairs.
  size_t (*scratch)(int64_t rows, int64_t pairs);
};

// The floor and the ceiling that a benchmark compares with; see peak.h.
struct CpuPeak {
  uint64_t (*read_memory)(const char* data, size_t n);
  float (*multiply_add)(int64_t steps);
  int64_t flops_per_step;
};

#define SPAC_DECLARE_ISA(isa)                                  \
  namespace isa {                                              \
  const ExpertKernels& expert_kernels(DType weights, DType x); \
  const CpuPeak& cpu_peak();                                   \
  }
SPAC_DECLARE_ISA(portable)
#ifdef SPAC_X86
SPAC_DECLARE_ISA(avx2)
SPAC_DECLARE_ISA(avx512)
SPAC_DECLARE_ISA(amx)
SPAC_DECLARE_ISA(vnni)  // not chosen by name: int4 under avx512 and amx, where there is VNNI
#endif
#undef SPAC_DECLARE_ISA

inline const ExpertKernels& expert_kernels(Isa isa, DType weights, DType x) {
#ifdef SPAC_X86
  const bool int4 = weights == DType::i4_32 || weights == DType::i4_128;
  if (int4 && isa >= Isa::avx512 && __builtin_cpu_supports("avx512vnni"))
    return vnni::expert_kernels(weights, x);
  if (isa == Isa::amx) return amx::expert_kernels(weights, x);
  if (isa == Isa::avx512) return avx512::expert_kernels(weights, x);
  if (isa == Isa::avx2) return avx2::expert_kernels(weights, x);
#endif
  (void)isa;
  return portable::expert_kernels(weights, x);
}

inline const CpuPeak& cpu_peak(Isa isa) {
#ifdef SPAC_X86
  if (isa == Isa::amx) return amx::cpu_peak();
  if (isa == Isa::avx512) return avx512::cpu_peak();
  if (isa == Isa::avx2) return avx2::cpu_peak();
#endif
  (void)isa;
  return portable::cpu_peak();
}

}  // namespace spac
