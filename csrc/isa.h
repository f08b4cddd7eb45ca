// Which instruction set the kernels use. The extension is compiled for the baseline machine; every
// ISA lives in its own namespace inside a pragma region (SPAC_TARGET_BEGIN ... SPAC_TARGET_END),
// because per-function target attributes break on lambdas and on unmarked helpers.
#pragma once
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#define SPAC_X86 1
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#define SPAC_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SPAC_TARGET_BEGIN(isa) \
  SPAC_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define SPAC_TARGET_END SPAC_PRAGMA(clang attribute pop)
#else
#define SPAC_TARGET_BEGIN(isa) SPAC_PRAGMA(GCC push_options) SPAC_PRAGMA(GCC target(isa))
#define SPAC_TARGET_END SPAC_PRAGMA(GCC pop_options)
#endif
#define SPAC_TARGET_AVX2 "avx2,fma,f16c"
#define SPAC_TARGET_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define SPAC_TARGET_AMX "amx-tile,amx-bf16," SPAC_TARGET_AVX512

namespace spac {

enum class Isa { portable, avx2, avx512, amx };
inline constexpr Isa kIsas[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::amx};
inline constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512", "amx"};

// bf16 tiles, and the kernel's permission to use them in this process: it keeps their state (8 KB a
// thread) only for those who ask, and refuses where a signal stack is too small for it.
inline bool amx_permitted() {
#ifdef SPAC_EMULATE_AMX
  return true;
#elif defined(SPAC_X86) && defined(__linux__)
  static const bool permitted = [] {
    unsigned a, b, c, d = 0;
    const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
    constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    return tiles && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return permitted;
#else
  return false;
#endif
}

inline bool isa_supported(Isa isa) {
#ifdef SPAC_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512 || isa == Isa::amx)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           (isa == Isa::avx512 || amx_permitted());
#endif
  return isa == Isa::portable;
}

inline Isa best_isa() {
  for (Isa isa : {Isa::amx, Isa::avx512, Isa::avx2})
    if (isa_supported(isa)) return isa;
  return Isa::portable;
}

// `source` names the setting in the error, e.g. "SPAC_CPU".
inline Isa parse_isa(const std::string& source, const std::string& name) {
  for (Isa isa : kIsas) {
    if (name != kIsaNames[static_cast<int>(isa)]) continue;
    if (isa_supported(isa)) return isa;
    throw std::runtime_error(source + ": this CPU cannot run '" + name +
                             "'; the best it can run is '" +
                             kIsaNames[static_cast<int>(best_isa())] + "'");
  }
  throw std::runtime_error(source + ": expected portable, avx2, avx512 or amx, got '" + name + "'");
}

inline std::atomic<int>& isa_choice() {
  static std::atomic<int> choice{-1};
  return choice;
}

// The forced ISA (set_isa, else SPAC_CPU), else the best one of this CPU.
inline Isa current_isa() {
  int choice = isa_choice().load(std::memory_order_relaxed);
  if (choice < 0) {
    const char* forced = std::getenv("SPAC_CPU");
    choice = static_cast<int>(forced && *forced ? parse_isa("SPAC_CPU", forced) : best_isa());
    isa_choice().store(choice, std::memory_order_relaxed);
  }
  return static_cast<Isa>(choice);
}

// "" returns to SPAC_CPU or detection.
inline void set_isa(const std::string& name) {
  isa_choice().store(name.empty() ? -1 : static_cast<int>(parse_isa("set_cpu_isa", name)));
}

}  // namespace spac
