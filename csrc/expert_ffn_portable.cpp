#include <cmath>
#include <type_traits>

#include "expert_ffn.h"

namespace spac::portable {
#include "simd_portable.h"
#include "activation.h"
#include "expert_ffn_tile.h"
#include "expert_ffn_kernels.h"
#include "int4_portable.h"
#include "expert_ffn_int4.h"
#include "peak.h"
}  // namespace spac::portable
