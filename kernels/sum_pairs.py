"""y[t] = sum over j, in order, of out[t * k + j]: the end of every path that works by pair."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sum_pairs_kernel(
    out_ptr,
    ids_ptr,
    address_ptr,
    y_ptr,
    E,
    H,
    K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid (T, blocks of H). Pairs that no expert here has served were never written."""
    t = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    total = tl.zeros((BLOCK_H,), tl.float32)
    for j in tl.static_range(K):
        e = tl.load(ids_ptr + t * K + j)
        valid = (e >= 0) & (e < E)
        address = tl.load(address_ptr + tl.where(valid, e, 0))
        width = tl.where(valid & (address != 0), H, 0)
        out_ptrs = out_ptr + (t * K + j) * H + offs_h
        total += tl.load(out_ptrs, mask=offs_h < width, other=0.0).to(tl.float32)
    tl.store(y_ptr + t * H + offs_h, total.to(y_ptr.dtype.element_ty), mask=mask_h)


def sum_pairs(out: Tensor, ids: Tensor, address: Tensor, y: Tensor) -> None:
    """out [T * k, H], ids [T, k], address int64 [E] -> y [T, H]; fp32 sums in the order of j."""
    T, H = y.shape
    block = min(1024, triton.next_power_of_2(H))
    _sum_pairs_kernel[(T, triton.cdiv(H, block))](
        out,
        ids,
        address,
        y,
        E=address.numel(),
        H=H,
        K=ids.shape[1],
        BLOCK_H=block,
        num_warps=4,
    )
