"""Who computes a window's experts: slots, the link or the CPU, in one launch of one program.

Few numbers are involved, so that waiting for memory is what takes time: everything is loaded once,
pairs are counted by comparing every one with every expert, and experts are ranked likewise. Where
the layer's state was complete before the kernel in front began, it is loaded while that one runs.
What crosses the link stays, in the slot of a resident that the window does not need.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spac.kernels.pdl import pdl_args, wait_for_previous
from spac.kernels.verify import check_state

_WARPS = 16
_COMPARISONS = 1 << 12  # at a time


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
    value_ptr,
    exchanged_ptr,
    source_ptr,
    target_ptr,
    place_ptr,
    flags_ptr,
    memory,
    memory_stride,
    max_utility,
    num_pairs,
    E,
    places,
    PLACES: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    EARLY: tl.constexpr,
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
    if PLACES > 0:
        value = tl.load(value_ptr + offs, mask=mask, other=0.0)
    wait_for_previous(EARLY)  # the ids come from the kernel in front; places are in use till here

    n = _count(ids_ptr, num_pairs, offs, E, EXPERTS, BLOCK_P)
    tl.store(frequency_ptr + offs, frequency + n, mask=mask)
    u += (n - u >= up).to(tl.int32) - (u - n >= down).to(tl.int32)
    tl.store(utility_ptr + offs, tl.minimum(tl.maximum(u, 0), max_utility), mask=mask)
    used, here = n > 0, slot != 0
    missing = used & (slot == 0)
    # Two sums in one: reductions are what takes time here.
    both = tl.sum(n.to(tl.int64) + (tl.where(here, n, 0).to(tl.int64) << 32), axis=0)
    experts = tl.sum(used.to(tl.int64) + (missing.to(tl.int64) << 32), axis=0)
    count = (experts >> 32).to(tl.int32)
    experts = experts & 0xFFFFFFFF
    add = tl.where(offs_c == 0, both & 0xFFFFFFFF, experts - count)
    add = tl.where(offs_c == 1, both >> 32, add)
    add = tl.where(offs_c == 2, experts, add)
    tl.store(counters_ptr + offs_c, counters + add)

    take = tl.where(count == E, all_missing, tl.sum(tl.where(offs == count, streams, 0), axis=0))
    take = tl.minimum(take, count)
    if PLACES > 0:
        take = tl.minimum(take, places)
    tl.store(streamed_ptr, streamed + take)
    key = n.to(tl.float32)
    if PLACES > 0:
        key += value
    rank = tl.zeros((EXPERTS,), tl.int32)  # among the missing, the highest key first
    worth = tl.zeros((EXPERTS,), tl.int32)  # among residents without pairs, the lowest value first
    for f0 in range(0, EXPERTS, CHUNK_E):
        other = f0 + tl.arange(0, CHUNK_E)
        m = _count(ids_ptr, num_pairs, other, E, CHUNK_E, BLOCK_P)
        theirs = tl.load(address_ptr + other, mask=other < E, other=1)
        first = other[None, :] < offs[:, None]
        their_key = m.to(tl.float32)
        if PLACES > 0:
            v = tl.load(value_ptr + other, mask=other < E, other=float("inf"))
            their_key += v
            idle = (theirs != 0) & (m == 0)
            lower = v[None, :] < value[:, None]
            lower = lower | (first & (v[None, :] == value[:, None]))
            worth += tl.sum((idle[None, :] & lower).to(tl.int32), axis=1)
        higher = their_key[None, :] > key[:, None]
        higher = higher | (first & (their_key[None, :] == key[:, None]))
        coming = (theirs == 0) & (m > 0)
        rank += tl.sum((coming[None, :] & higher).to(tl.int32), axis=1)
    chosen = missing & (rank < take)
    target = host
    if PLACES > 0:
        offs_a = tl.arange(0, PLACES)
        mask_a = offs_a < places
        comes = chosen[None, :] & (rank[None, :] == offs_a[:, None])
        idle = here & (n == 0) & mask
        leaves = idle[None, :] & (worth[None, :] == offs_a[:, None])
        # Of one expert: what it is worth, above its name + 1.
        name = offs.to(tl.int64) + 1
        victim = name + (value.to(tl.int32, bitcast=True).to(tl.int64) << 32)
        victim = tl.sum(tl.where(leaves, victim[None, :], 0), axis=1)
        beaten = (victim >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        victim = (victim & 0xFFFFFFFF).to(tl.int32)
        stays = comes & (key[None, :] > beaten[:, None]) & (victim > 0)[:, None]
        newcomer = tl.sum(tl.where(stays, name[None, :], 0), axis=1).to(tl.int32)
        swap = newcomer > 0
        room = tl.sum(tl.where(leaves, slot[None, :], 0), axis=1)
        to = tl.where(swap, room, memory + offs_a * memory_stride)
        source = tl.sum(tl.where(comes, host[None, :], 0), axis=1)
        tl.store(source_ptr + offs_a, source, mask=mask_a)
        tl.store(target_ptr + offs_a, to, mask=mask_a)
        tl.store(flags_ptr + offs_a, tl.zeros((PLACES,), tl.int32), mask=mask_a)
        tl.store(exchanged_ptr + 2 * offs_a, tl.where(swap, newcomer, 0) - 1, mask=mask_a)
        tl.store(exchanged_ptr + 2 * offs_a + 1, tl.where(swap, victim, 0) - 1, mask=mask_a)
        # Where who comes goes, + 1 if it stays there; 2 for who leaves. Addresses are even by far.
        news = tl.where(comes, to[:, None], 0) + (stays & swap[:, None]).to(tl.int64)
        news = tl.sum(news + 2 * (leaves & swap[:, None]).to(tl.int64), axis=0)
        target = (news >> 2) << 2
        slot = tl.where(news == 2, 0, slot)
        tl.store(address_ptr + offs, tl.where(news & 1 == 1, target, slot), mask=mask)
        tl.store(place_ptr + offs, tl.where(chosen, rank, -1), mask=mask)
    tl.store(where_ptr + offs, tl.where(chosen, target, slot), mask=mask)
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
    places: Any = None,
    chained: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `spac.reference.split_window`; every tensor but ids contiguous.

    chained: as of `ops.split_window`.
    """
    E = address.numel()
    check_state(address, utility, bounds, counters)
    checked = [
        ("host", host, torch.int64, E),
        ("frequency", frequency, torch.int64, E),
        ("streams", streams, torch.int32, E + 1),
        ("streamed", streamed, torch.int64, 1),
    ]
    room = 0 if places is None else len(places.source)
    if room:
        checked += [
            ("value", places.value, torch.float32, E),
            ("exchanged", places.exchanged, torch.int32, 2 * room),
        ]
    for name, tensor, dtype, size in checked:
        if tensor.dtype != dtype or tensor.numel() != size or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous {dtype} [{size}], "
                f"got {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
            )
    ids = ids.contiguous()
    where = torch.empty_like(address)
    cpu_ids = torch.empty(ids.shape, dtype=torch.int32, device=ids.device)
    experts = triton.next_power_of_2(E)
    most = max(1, _COMPARISONS // experts)
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
        places.value if room else None,
        places.exchanged if room else None,
        places.source if room else None,
        places.target if room else None,
        places.of if room else None,
        places.flags if room else None,
        places.memory.data_ptr() if room else 0,
        places.memory.stride(0) if room else 0,
        max_utility,
        ids.numel(),
        E,
        room,
        PLACES=triton.next_power_of_2(room) if room else 0,
        EXPERTS=experts,
        CHUNK_E=min(experts, most),
        BLOCK_P=min(triton.next_power_of_2(ids.numel()), most),
        num_warps=_WARPS,
        **pdl_args(ids.device, chained),
    )
    return where, cpu_ids
