"""Splits a window's pairs by residency, groups them and updates the utility, in one launch.

A program answers for a few pairs or for a few experts, and reads all pairs for it, so programs
need nothing from each other: a pair's place in the order is the number of pairs before it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_P, BLOCK_E, NUM_WARPS = 8, 8, 4


@triton.jit
def _keys(ids_ptr, address_ptr, offs_q, num_pairs, E):
    """Ids of some pairs (-1 beyond the end), and what the pairs are sorted by: resident ones by
    expert, then the absent ones (E), then what is beyond the end (E + 1)."""
    mask_q = offs_q < num_pairs
    ids = tl.load(ids_ptr + offs_q, mask=mask_q, other=-1, cache_modifier=".cg")
    valid = (ids >= 0) & (ids < E)
    here = valid & (tl.load(address_ptr + tl.where(valid, ids, 0)) != 0)
    return ids, tl.where(here, ids.to(tl.int32), tl.where(mask_q, E, E + 1))


@triton.jit
def split_pairs(
    offs_p,
    ids_ptr,
    address_ptr,
    resident_ptr,
    cpu_ptr,
    order_ptr,
    num_pairs,
    E,
    BLOCK_P: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The side of the pairs offs_p [BLOCK_P], and their places in the order."""
    mask_p = offs_p < num_pairs
    mine = tl.load(ids_ptr + offs_p, mask=mask_p, other=-1, cache_modifier=".cg")
    valid = (mine >= 0) & (mine < E)
    here = valid & (tl.load(address_ptr + tl.where(valid, mine, 0)) != 0)
    key = tl.where(here, mine.to(tl.int32), E)
    place = tl.zeros((BLOCK_P,), tl.int32)
    for q0 in range(0, num_pairs, CHUNK):
        offs_q = q0 + tl.arange(0, CHUNK)
        ids_q, key_q = _keys(ids_ptr, address_ptr, offs_q, num_pairs, E)
        before = (key_q[None, :] < key[:, None]) | (
            (key_q[None, :] == key[:, None]) & (offs_q[None, :] < offs_p[:, None])
        )
        place += tl.sum(before.to(tl.int32), axis=1)
    minus = tl.full((BLOCK_P,), -1, tl.int32)
    own = mine.to(tl.int32)
    tl.store(resident_ptr + offs_p, tl.where(here, own, minus), mask=mask_p)
    tl.store(cpu_ptr + offs_p, tl.where(valid & (here == 0), own, minus), mask=mask_p)
    tl.store(order_ptr + place, tl.where(here, offs_p, minus), mask=mask_p)


@triton.jit
def count_experts(
    offs_e,
    ids_ptr,
    address_ptr,
    utility_ptr,
    bounds_ptr,
    counters_ptr,
    counts_ptr,
    offsets_ptr,
    max_utility,
    num_pairs,
    E,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Counts, offsets and utility of the experts offs_e [BLOCK_E], and their share of counters."""
    mask_e = offs_e < E
    u = tl.load(utility_ptr + offs_e, mask=mask_e, other=0)
    here_e = tl.load(address_ptr + offs_e, mask=mask_e, other=0) != 0
    up = tl.load(bounds_ptr)
    down = tl.load(bounds_ptr + 1)
    n = tl.zeros((BLOCK_E,), tl.int32)
    begin = tl.zeros((BLOCK_E,), tl.int32)
    for q0 in range(0, num_pairs, CHUNK):
        offs_q = q0 + tl.arange(0, CHUNK)
        ids_q, key_q = _keys(ids_ptr, address_ptr, offs_q, num_pairs, E)
        n += tl.sum((ids_q[None, :] == offs_e[:, None]).to(tl.int32), axis=1)
        begin += tl.sum((key_q[None, :] < offs_e[:, None]).to(tl.int32), axis=1)
    n = tl.where(mask_e, n, 0)
    tl.store(offsets_ptr + offs_e, begin, mask=offs_e <= E)
    tl.store(counts_ptr + offs_e, n, mask=mask_e)
    u += (n - u >= up).to(tl.int32) - (u - n >= down).to(tl.int32)
    u = tl.minimum(tl.maximum(u, 0), max_utility)
    tl.store(utility_ptr + offs_e, u, mask=mask_e)
    used = n > 0
    tl.atomic_add(counters_ptr, tl.sum(n, axis=0).to(tl.int64))
    tl.atomic_add(counters_ptr + 1, tl.sum(tl.where(here_e, n, 0), axis=0).to(tl.int64))
    tl.atomic_add(counters_ptr + 2, tl.sum(used.to(tl.int32), axis=0).to(tl.int64))
    tl.atomic_add(counters_ptr + 3, tl.sum((used & here_e).to(tl.int32), axis=0).to(tl.int64))


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
    blocks_p,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid (blocks of pairs + blocks of the experts and their end,)."""
    pid = tl.program_id(0)
    if pid < blocks_p:
        offs_p = pid * BLOCK_P + tl.arange(0, BLOCK_P)
        split_pairs(
            offs_p, ids_ptr, address_ptr, resident_ptr, cpu_ptr, order_ptr, num_pairs, E,
            BLOCK_P, CHUNK,
        )  # fmt: skip
    else:
        offs_e = (pid - blocks_p) * BLOCK_E + tl.arange(0, BLOCK_E)
        count_experts(
            offs_e, ids_ptr, address_ptr, utility_ptr, bounds_ptr, counters_ptr, counts_ptr,
            offsets_ptr, max_utility, num_pairs, E, BLOCK_E, CHUNK,
        )  # fmt: skip


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def check_state(address: Tensor, utility: Tensor, bounds: Tensor, counters: Tensor) -> None:
    """Raise ValueError unless the state of a layer has the types and sizes of `verify`."""
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


def empty_outputs(shape: torch.Size, E: int, device: torch.device) -> Outputs:
    """resident_ids, cpu_ids, counts, order and offsets of a window [W, k] of ids."""

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=device)

    return empty(*shape), empty(*shape), empty(E), empty(shape.numel()), empty(E + 1)


def verify(
    ids: Tensor,
    address: Tensor,
    utility: Tensor,
    bounds: Tensor,
    counters: Tensor,
    max_utility: int,
) -> Outputs:
    """As `spac.reference.verify`, bit for bit; the order of the integer atomics does not show.

    ids [W, k] int32 or int64, address int64 [E], utility int32 [E], bounds int32 [2] and counters
    int64 [4], each contiguous.
    """
    check_state(address, utility, bounds, counters)
    ids = ids.contiguous()
    pairs, E = ids.numel(), address.numel()
    outputs = empty_outputs(ids.shape, E, ids.device)
    blocks_p = triton.cdiv(pairs, BLOCK_P)
    _verify_kernel[(blocks_p + triton.cdiv(E + 1, BLOCK_E),)](
        ids,
        address,
        utility,
        bounds,
        counters,
        *outputs,
        max_utility,
        num_pairs=pairs,
        E=E,
        blocks_p=blocks_p,
        BLOCK_P=BLOCK_P,
        BLOCK_E=BLOCK_E,
        CHUNK=min(512, max(16, triton.next_power_of_2(pairs))),
        num_warps=NUM_WARPS,
    )
    return outputs
