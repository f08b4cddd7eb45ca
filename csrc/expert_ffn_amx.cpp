#include <algorithm>
#include <cmath>
#include <type_traits>

#include "expert_ffn.h"

#ifdef SPAC_X86
#ifndef SPAC_EMULATE_AMX
// See expert_ffn_avx512.cpp.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

SPAC_TARGET_BEGIN(SPAC_TARGET_AMX)
#endif
namespace spac::amx {
#ifndef SPAC_EMULATE_AMX
#include "simd_avx512.h"
#else
#include "simd_portable.h"
#endif
#include "activation.h"
#include "expert_ffn_tile.h"
#include "simd_amx.h"
#define SPAC_DENSE
#include "expert_ffn_kernels.h"

// Four independent tiles, as the widest block of the kernels uses them.
inline float multiply_tiles(int64_t steps) {
  float sums[TILE * TILE] = {};
  Tiles tiles;
  tiles.clear<0, 0>(), tiles.clear<0, 1>(), tiles.clear<1, 0>(), tiles.clear<1, 1>();
  tiles.load_a<0>(sums, 64), tiles.load_a<1>(sums, 64), tiles.load_b<0>(sums), tiles.load_b<1>(sums);
  for (int64_t s = 0; s < steps; ++s) {
    tiles.multiply<0, 0>(), tiles.multiply<0, 1>();
    tiles.multiply<1, 0>(), tiles.multiply<1, 1>();
  }
  tiles.store<0, 0>(sums, 64);
  return sums[0];
}

const CpuPeak& cpu_peak() {
  static const CpuPeak peak = {avx512::cpu_peak().read_memory, multiply_tiles,
                               4 * 2 * TILE * TILE * TILE_K};
  return peak;
}
}  // namespace spac::amx
#ifndef SPAC_EMULATE_AMX
SPAC_TARGET_END
#endif
#endif
