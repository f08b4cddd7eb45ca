"""Who computes a window's experts: slots, the link or the CPU, in one launch of one program.

Few numbers are involved, so that waiting for memory is what takes time: everything is loaded once,
pairs are counted by comparing every one with every expert, and experts are ranked likewise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spac.kernels.verify import check_state


@triton.jit
def _count(ids_ptr, num_pairs, offs_e, E, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr):
    """Pairs of the experts offs_e [BLOCK]."""
    n = tl.zeros((BLOCK,), tl.int32)
    for p0 in range(0, num_pairs, BLOCK_P):
        offs_p = p0 + tl.arange(0, BLOCK_P)
        ids = tl.load(ids_ptr + offs_p, mask=offs_p < num_pairs, other=-1).to(tl.int32)
        n += tl.sum((ids[None, :] == offs_e[:, None]).to(tl.int32), axis=1)
    return tl.where(offs_e < E, n, 0)


@triton.jit
def _split_window_kernel(
    ids_ptr,
    address_ptr,
    host_ptr,
    utility_ptr,
    bounds_ptr,
    counters_ptr,
    frequency_ptr,
    streams_ptr,
    streamed_ptr,
    where_ptr,
    cpu_ptr,
    max_utility,
    num_pairs,
    E,
    EXPERTS: tl.constexpr,
    CHUNK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    offs = tl.arange(0, EXPERTS)
    mask = offs < E
    slot = tl.load(address_ptr + offs, mask=mask, other=1)
    host = tl.load(host_ptr + offs, mask=mask, other=0)
    u = tl.load(utility_ptr + offs, mask=mask, other=0)
    frequency = tl.load(frequency_ptr + offs, mask=mask, other=0)
    streams = tl.load(streams_ptr + offs, mask=mask, other=0)
    all_missing = tl.load(streams_ptr + E)
    up, down = tl.load(bounds_ptr), tl.load(bounds_ptr + 1)
    offs_c = tl.arange(0, 4)
    counters = tl.load(counters_ptr + offs_c)
    streamed = tl.load(streamed_ptr)

    n = _count(ids_ptr, num_pairs, offs, E, EXPERTS, BLOCK_P)
    tl.store(frequency_ptr + offs, frequency + n, mask=mask)
    u += (n - u >= up).to(tl.int32) - (u - n >= down).to(tl.int32)
    tl.store(utility_ptr + offs, tl.minimum(tl.maximum(u, 0), max_utility), mask=mask)
    used, here = n > 0, slot != 0
    missing = used & (slot == 0)
    count = tl.sum(missing.to(tl.int32), axis=0)
    experts = tl.sum(used.to(tl.int32), axis=0)
    add = tl.where(offs_c == 0, tl.sum(n, axis=0), experts - count)
    add = tl.where(offs_c == 1, tl.sum(tl.where(here, n, 0), axis=0), add)
    add = tl.where(offs_c == 2, experts, add)
    tl.store(counters_ptr + offs_c, counters + add)

    take = tl.where(count == E, all_missing, tl.sum(tl.where(offs == count, streams, 0), axis=0))
    rank = tl.zeros((EXPERTS,), tl.int32)
    for f0 in range(0, EXPERTS, CHUNK_E):
        other = f0 + tl.arange(0, CHUNK_E)
        m = _count(ids_ptr, num_pairs, other, E, CHUNK_E, BLOCK_P)
        m = tl.where(tl.load(address_ptr + other, mask=other < E, other=1) == 0, m, 0)
        before = (m[None, :] > n[:, None]) | (
            (m[None, :] == n[:, None]) & (other[None, :] < offs[:, None])
        )
        rank += tl.sum(before.to(tl.int32), axis=1)
    chosen = missing & (rank < take)
    tl.store(where_ptr + offs, tl.where(chosen, host, slot), mask=mask)
    tl.store(streamed_ptr, streamed + tl.sum(chosen.to(tl.int32), axis=0))
    left = tl.where(missing & (rank >= take), offs, -2)  # the CPU's; -2 is nobody's id
    for p0 in range(0, num_pairs, BLOCK_P):
        offs_p = p0 + tl.arange(0, BLOCK_P)
        ids = tl.load(ids_ptr + offs_p, mask=offs_p < num_pairs, other=-1).to(tl.int32)
        mine = tl.max((ids[:, None] == left[None, :]).to(tl.int32), axis=1)
        minus = tl.full((BLOCK_P,), -1, tl.int32)
        tl.store(cpu_ptr + offs_p, tl.where(mine > 0, ids, minus), mask=offs_p < num_pairs)


def split_window(
    ids: Tensor,
    address: Tensor,
    host: Tensor,
    utility: Tensor,
    bounds: Tensor,
    counters: Tensor,
    frequency: Tensor,
    streams: Tensor,
    streamed: Tensor,
    max_utility: int,
) -> tuple[Tensor, Tensor]:
    """As `spac.reference.split_window`; every tensor but ids contiguous."""
    E = address.numel()
    check_state(address, utility, bounds, counters)
    for name, tensor, dtype, size in (
        ("host", host, torch.int64, E),
        ("frequency", frequency, torch.int64, E),
        ("streams", streams, torch.int32, E + 1),
        ("streamed", streamed, torch.int64, 1),
    ):
        if tensor.dtype != dtype or tensor.numel() != size or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous {dtype} [{size}], "
                f"got {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
            )
    ids = ids.contiguous()
    where = torch.empty_like(address)
    cpu_ids = torch.empty(ids.shape, dtype=torch.int32, device=ids.device)
    experts = triton.next_power_of_2(E)
    most = max(1, (1 << 14) // experts)  # comparisons at a time
    _split_window_kernel[(1,)](
        ids,
        address,
        host,
        utility,
        bounds,
        counters,
        frequency,
        streams,
        streamed,
        where,
        cpu_ids,
        max_utility,
        ids.numel(),
        E,
        EXPERTS=experts,
        CHUNK_E=min(experts, most),
        BLOCK_P=min(triton.next_power_of_2(ids.numel()), most),
        num_warps=16,
    )
    return where, cpu_ids
