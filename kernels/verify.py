"""Splits a window's pairs by residency, groups them and updates the utility, in one launch.

Every program reads all pairs and answers for its own 64 pairs and its own experts, so programs
need nothing from each other: a pair's place in the order is the number of pairs before it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _verify_kernel(
    ids_ptr,
    address_ptr,
    utility_ptr,
    bounds_ptr,
    counters_ptr,
    resident_ptr,
    cpu_ptr,
    counts_ptr,
    order_ptr,
    offsets_ptr,
    max_utility,
    num_pairs,
    E,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid (max(blocks of pairs, blocks of experts),)."""
    pid = tl.program_id(0)
    offs_p = pid * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < num_pairs
    mine = tl.load(ids_ptr + offs_p, mask=mask_p, other=-1)
    valid = (mine >= 0) & (mine < E)
    here = valid & (tl.load(address_ptr + tl.where(valid, mine, 0)) != 0)
    key = tl.where(here, mine.to(tl.int32), E)
    offs_e = pid * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    place = tl.zeros((BLOCK_P,), tl.int32)
    n = tl.zeros((BLOCK_E,), tl.int32)
    begin = tl.zeros((BLOCK_E,), tl.int32)
    total = tl.zeros((CHUNK,), tl.int32)
    for q0 in range(0, num_pairs, CHUNK):
        offs_q = q0 + tl.arange(0, CHUNK)
        mask_q = offs_q < num_pairs
        ids = tl.load(ids_ptr + offs_q, mask=mask_q, other=-1)
        valid_q = (ids >= 0) & (ids < E)
        here_q = valid_q & (tl.load(address_ptr + tl.where(valid_q, ids, 0)) != 0)
        # Pairs beyond the end sort behind everything, absent ones behind the resident ones.
        key_q = tl.where(here_q, ids.to(tl.int32), tl.where(mask_q, E, E + 1))
        before = (key_q[None, :] < key[:, None]) | (
            (key_q[None, :] == key[:, None]) & (offs_q[None, :] < offs_p[:, None])
        )
        place += tl.sum(before.to(tl.int32), axis=1)
        n += tl.sum((ids[None, :] == offs_e[:, None]).to(tl.int32), axis=1)
        begin += tl.sum((key_q[None, :] < offs_e[:, None]).to(tl.int32), axis=1)
        total += here_q.to(tl.int32)

    minus = tl.full((BLOCK_P,), -1, tl.int32)
    own = mine.to(tl.int32)
    tl.store(resident_ptr + offs_p, tl.where(here, own, minus), mask=mask_p)
    tl.store(cpu_ptr + offs_p, tl.where(valid & (here == 0), own, minus), mask=mask_p)
    tl.store(order_ptr + place, tl.where(here, offs_p, minus), mask=mask_p)

    tl.store(counts_ptr + offs_e, n, mask=mask_e)
    tl.store(offsets_ptr + offs_e, begin, mask=mask_e)
    if pid == 0:
        tl.store(offsets_ptr + E, tl.sum(total, axis=0))
    u = tl.load(utility_ptr + offs_e, mask=mask_e, other=0)
    up = tl.load(bounds_ptr)
    down = tl.load(bounds_ptr + 1)
    u += (n - u >= up).to(tl.int32) - (u - n >= down).to(tl.int32)
    u = tl.minimum(tl.maximum(u, 0), max_utility)
    tl.store(utility_ptr + offs_e, u, mask=mask_e)

    address = tl.load(address_ptr + offs_e, mask=mask_e, other=0)
    used = (n > 0) & mask_e
    tl.atomic_add(counters_ptr, tl.sum(valid.to(tl.int64), axis=0))
    tl.atomic_add(counters_ptr + 1, tl.sum(here.to(tl.int64), axis=0))
    tl.atomic_add(counters_ptr + 2, tl.sum(used.to(tl.int64), axis=0))
    tl.atomic_add(counters_ptr + 3, tl.sum((used & (address != 0)).to(tl.int64), axis=0))


def verify(
    ids: Tensor,
    address: Tensor,
    utility: Tensor,
    bounds: Tensor,
    counters: Tensor,
    max_utility: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `spac.reference.verify`, bit for bit; the order of the integer atomics does not show.

    ids [W, k] int32 or int64, address int64 [E], utility int32 [E], bounds int32 [2] and counters
    int64 [4], each contiguous.
    """
    E = address.numel()
    for name, tensor, dtype, size in (
        ("address", address, torch.int64, E),
        ("utility", utility, torch.int32, E),
        ("bounds", bounds, torch.int32, 2),
        ("counters", counters, torch.int64, 4),
    ):
        if tensor.dtype != dtype or tensor.numel() != size or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous {dtype} [{size}], "
                f"got {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
            )
    ids = ids.contiguous()
    pairs, device = ids.numel(), ids.device
    resident_ids = torch.empty(ids.shape, dtype=torch.int32, device=device)
    cpu_ids = torch.empty(ids.shape, dtype=torch.int32, device=device)
    counts, order, offsets = (
        torch.empty(n, dtype=torch.int32, device=device) for n in (E, pairs, E + 1)
    )
    block_p, block_e = 32, 32
    _verify_kernel[(max(triton.cdiv(pairs, block_p), triton.cdiv(E, block_e)),)](
        ids,
        address,
        utility,
        bounds,
        counters,
        resident_ids,
        cpu_ids,
        counts,
        order,
        offsets,
        max_utility,
        num_pairs=pairs,
        E=E,
        BLOCK_P=block_p,
        BLOCK_E=block_e,
        CHUNK=min(256, max(16, triton.next_power_of_2(pairs))),
        num_warps=4,
    )
    return resident_ids, cpu_ids, counts, order, offsets
