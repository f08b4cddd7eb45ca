// The int4 kernels of AVX-512 for CPUs that multiply bytes in one instruction.
#include <cmath>
#include <type_traits>

#include "expert_ffn.h"

#ifdef SPAC_X86
// GCC 12 warns about the undefined operands inside its own intrinsics (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

SPAC_TARGET_BEGIN(SPAC_TARGET_AVX512 ",avx512vnni")
namespace spac::vnni {
#define SPAC_VNNI
#include "simd_avx512.h"
#include "activation.h"
#include "expert_ffn_tile.h"
#include "expert_ffn_kernels.h"
#include "int4_avx512.h"
#include "expert_ffn_int4.h"
}  // namespace spac::vnni
SPAC_TARGET_END
#endif
