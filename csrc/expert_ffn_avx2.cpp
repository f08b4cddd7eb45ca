#include <algorithm>
#include <cmath>
#include <type_traits>

#include "expert_ffn.h"

#ifdef SPAC_X86
#include <immintrin.h>

SPAC_TARGET_BEGIN(SPAC_TARGET_AVX2)
namespace spac::avx2 {
#include "simd_avx2.h"
#include "activation.h"
#include "expert_ffn_tile.h"
#include "expert_ffn_kernels.h"
#include "expert_ffn_int16.h"
#include "peak.h"
}  // namespace spac::avx2
SPAC_TARGET_END
#endif
