"""Redoes the utility update of a window once it is known which of its rows were rejected."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _settle_kernel(
    utility_ptr,
    before_ptr,
    ids_ptr,
    accepted_ptr,
    bounds_ptr,
    rejected_weight,
    max_utility,
    num_pairs,
    K,
    E,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid (layers, blocks of experts). n = kept + weight * rejected is exact in fp64."""
    layer = tl.program_id(0)
    offs_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    kept_pairs = (tl.load(accepted_ptr) + 1) * K
    kept = tl.zeros((BLOCK_E,), tl.int32)
    rejected = tl.zeros((BLOCK_E,), tl.int32)
    for p0 in range(0, num_pairs, CHUNK):
        offs_p = p0 + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + layer * num_pairs + offs_p, mask=offs_p < num_pairs, other=-1)
        hit = ids[None, :] == offs_e[:, None]
        keep = (offs_p < kept_pairs)[None, :]
        kept += tl.sum((hit & keep).to(tl.int32), axis=1)
        rejected += tl.sum((hit & (keep == 0)).to(tl.int32), axis=1)
    u = tl.load(before_ptr + layer * E + offs_e, mask=mask_e, other=0)
    weight = tl.full((BLOCK_E,), rejected_weight, tl.float32).to(tl.float64)
    n = kept.to(tl.float64) + weight * rejected.to(tl.float64)
    up = tl.load(bounds_ptr + 2 * layer)
    down = tl.load(bounds_ptr + 2 * layer + 1)
    gain = n - u.to(tl.float64)
    u += (gain >= up.to(tl.float64)).to(tl.int32) - (-gain >= down.to(tl.float64)).to(tl.int32)
    u = tl.minimum(tl.maximum(u, 0), max_utility)
    tl.store(utility_ptr + layer * E + offs_e, u, mask=mask_e)


def settle(
    utility: Tensor,
    before: Tensor,
    ids: Tensor,
    accepted: Tensor,
    bounds: Tensor,
    rejected_weight: float,
    max_utility: int,
) -> None:
    """As `spac.reference.settle`, bit for bit, for all layers in one launch.

    utility, before int32 [L, E], ids [L, W, k] int, accepted int (one element), bounds int32
    [L, 2], each contiguous; `rejected_weight` is taken in fp32. utility changes in place.
    """
    L, W, K = ids.shape
    E = utility.shape[1]
    for name, tensor, shape in (
        ("utility", utility, (L, E)),
        ("before", before, (L, E)),
        ("bounds", bounds, (L, 2)),
    ):
        if tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous {list(shape)}, "
                f"got {list(tensor.shape)} with strides {tensor.stride()}"
            )
    block_e = 64
    _settle_kernel[(L, triton.cdiv(E, block_e))](
        utility,
        before,
        ids.contiguous(),
        accepted,
        bounds,
        float(rejected_weight),
        max_utility,
        num_pairs=W * K,
        K=K,
        E=E,
        BLOCK_E=block_e,
        CHUNK=min(128, max(16, triton.next_power_of_2(W * K))),
        num_warps=4,
    )
