"""Who computes a window's experts: slots, the link or the CPU, in one launch of one program.

Few numbers are involved, so that waiting takes the time, for memory and at barriers. Pairs are
counted by comparing every one with every expert, experts are ranked likewise, all in one order: the
missing ones, then the residents that may leave. An expert then knows its number; it leaves word for
the expert with whom it may change places, and decides by itself what it does. Where the layer's
state was complete before the kernel in front began, it is loaded while that one runs.
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

_WARPS = 8, 16  # of up to 128 experts, of more
_UNROLLED = 512  # pairs or experts, with which every expert is compared in one piece of code
_LANES = tl.constexpr(32)  # comparisons of one warp, whose sum needs no other warp
_NOBODY = tl.constexpr(-(1 << 60))


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def _order(key, missing, idle, offs, EXPERTS: tl.constexpr):
    """int64 [EXPERTS], larger for who comes first: missing experts, the highest key first, then
    idle residents, the lowest key first, of equals the lower id; all others are nobody."""
    bits = key.to(tl.int32, bitcast=True)
    bits = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)  # in the order of the keys
    order = tl.where(missing, bits + (1 << 33), -1 - bits) * EXPERTS + (EXPERTS - 1 - offs)
    return tl.where(missing | idle, order, _NOBODY)


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
    scratch_ptr,
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
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    EARLY: tl.constexpr,
):
    offs = tl.arange(0, EXPERTS)
    mask = offs < E
    slot = tl.load(address_ptr + offs, mask=mask, other=1)
    host = tl.load(host_ptr + offs, mask=mask, other=0)
    u = tl.load(utility_ptr + offs, mask=mask, other=0)
    frequency = tl.load(frequency_ptr + offs, mask=mask, other=0)
    up, down = tl.load(bounds_ptr), tl.load(bounds_ptr + 1)
    offs_c = tl.arange(0, 4)
    counters = tl.load(counters_ptr + offs_c)
    streamed = tl.load(streamed_ptr)
    value = tl.zeros((EXPERTS,), tl.float32)
    if PLACES > 0:
        value = tl.load(value_ptr + offs, mask=mask, other=0.0)
    wait_for_previous(EARLY)  # the ids come from the kernel in front; places are in use till here

    found = tl.zeros((EXPERTS, _LANES), tl.int32)
    for p0 in range(0, num_pairs, BLOCK_P):
        for p1 in tl.static_range(0, BLOCK_P, _LANES):
            offs_p = p0 + p1 + tl.arange(0, _LANES)
            ids = tl.load(ids_ptr + offs_p, mask=offs_p < num_pairs, other=-1)
            ids = tl.where((ids >= 0) & (ids < E), ids, -1).to(tl.int32)
            found += (ids[None, :] == offs[:, None]).to(tl.int32)
    n = tl.where(mask, tl.sum(found, axis=1), 0)
    used, here = n > 0, slot != 0
    missing, idle = used & (slot == 0), here & (n == 0) & mask
    key = n.to(tl.float32) + value
    tl.store(scratch_ptr + offs, _order(key, missing, idle & (PLACES > 0), offs, EXPERTS))
    # Sums share one reduction, which is what takes time here.
    pairs = n.to(tl.int64) + (tl.where(here, n, 0).to(tl.int64) << 32)
    experts = used.to(tl.int64) + (missing.to(tl.int64) << 20) + (idle.to(tl.int64) << 40)
    pairs, experts = tl.reduce((pairs, experts), 0, _add_both)
    tl.debug_barrier()  # between the order and those who read it
    count = (experts >> 20).to(tl.int32) & 0xFFFFF
    idle_count = (experts >> 40).to(tl.int32)
    take = tl.minimum(tl.load(streams_ptr + count), count)
    experts = experts & 0xFFFFF
    add = tl.where(offs_c == 0, pairs & 0xFFFFFFFF, experts - count)
    add = tl.where(offs_c == 1, pairs >> 32, add)
    add = tl.where(offs_c == 2, experts, add)
    tl.store(counters_ptr + offs_c, counters + add)
    tl.store(frequency_ptr + offs, frequency + n, mask=mask)
    u += (n - u >= up).to(tl.int32) - (u - n >= down).to(tl.int32)
    tl.store(utility_ptr + offs, tl.minimum(tl.maximum(u, 0), max_utility), mask=mask)

    mine = tl.load(scratch_ptr + offs)
    found = tl.zeros((EXPERTS, _LANES), tl.int32)
    for f0 in range(0, EXPERTS, BLOCK_E):
        for f1 in tl.static_range(0, BLOCK_E, _LANES):
            others = tl.load(scratch_ptr + f0 + f1 + tl.arange(0, _LANES))
            found += (others[None, :] > mine[:, None]).to(tl.int32)
    rank = tl.sum(found, axis=1)

    if PLACES > 0:
        take = tl.minimum(take, places)
    tl.store(streamed_ptr, streamed + take)
    chosen = missing & (rank < take)
    left_ptr = scratch_ptr + EXPERTS  # whether the CPU has the expert
    tl.store(left_ptr + offs, (missing & (rank >= take)).to(tl.int64))
    target = host
    if PLACES > 0:
        # The i-th who comes and the i-th who may leave tell each other their key and name.
        new_ptr = left_ptr + EXPERTS
        old_ptr = new_ptr + PLACES
        room_ptr = old_ptr + PLACES
        message = offs + (key.to(tl.int32, bitcast=True).to(tl.int64) << 32)
        worth = rank - count
        leaves = idle & (worth < take)
        tl.store(new_ptr + rank, message, mask=chosen)
        tl.store(old_ptr + worth, message, mask=leaves)
        tl.store(room_ptr + worth, slot, mask=leaves)
    tl.debug_barrier()  # between what they tell each other and those who ask
    if PLACES > 0:
        swap = chosen & (rank < idle_count)
        old = tl.load(old_ptr + rank, mask=swap, other=0)
        room = tl.load(room_ptr + rank, mask=swap, other=0)
        new = tl.load(new_ptr + worth, mask=leaves, other=0)
    for p0 in range(0, num_pairs, BLOCK_P):
        offs_p = p0 + tl.arange(0, BLOCK_P)
        ids = tl.load(ids_ptr + offs_p, mask=offs_p < num_pairs, other=-1)
        left = tl.load(left_ptr + ids, mask=(ids >= 0) & (ids < E), other=0)
        cpu_ids = tl.where(left > 0, ids, -1).to(tl.int32)
        tl.store(cpu_ptr + offs_p, cpu_ids, mask=offs_p < num_pairs)
    if PLACES > 0:
        swap = swap & (key > (old >> 32).to(tl.int32).to(tl.float32, bitcast=True))
        leaving = leaves & ((new >> 32).to(tl.int32).to(tl.float32, bitcast=True) > key)
        target = tl.where(swap, room, memory + rank * memory_stride)
        slot = tl.where(leaving, 0, slot)
        tl.store(address_ptr + offs, tl.where(swap, room, slot), mask=mask)
        tl.store(place_ptr + offs, tl.where(chosen, rank, -1), mask=mask)
        tl.store(source_ptr + rank, host, mask=chosen)
        tl.store(target_ptr + rank, target, mask=chosen)
        tl.store(exchanged_ptr + 2 * rank, tl.where(swap, offs, -1), mask=chosen)
        victim = (old & 0xFFFFFFFF).to(tl.int32)
        tl.store(exchanged_ptr + 2 * rank + 1, tl.where(swap, victim, -1), mask=chosen)
        offs_a = tl.arange(0, PLACES)
        tl.store(flags_ptr + offs_a, tl.zeros((PLACES,), tl.int32), mask=offs_a < places)
        unused = (offs_a >= take) & (offs_a < places)
        tl.store(source_ptr + offs_a, tl.zeros((PLACES,), tl.int64), mask=unused)
        tl.store(target_ptr + offs_a, memory + offs_a * memory_stride, mask=unused)
        tl.store(exchanged_ptr + 2 * offs_a, tl.full((PLACES,), -1, tl.int32), mask=unused)
        tl.store(exchanged_ptr + 2 * offs_a + 1, tl.full((PLACES,), -1, tl.int32), mask=unused)
    tl.store(where_ptr + offs, tl.where(chosen, target, slot), mask=mask)


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
    experts = max(_LANES.value, triton.next_power_of_2(E))
    most_places = triton.next_power_of_2(room) if room else 0
    scratch = torch.empty(2 * experts + 3 * most_places, dtype=torch.int64, device=ids.device)
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
        scratch,
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
        PLACES=most_places,
        EXPERTS=experts,
        BLOCK_E=min(experts, _UNROLLED),
        BLOCK_P=min(max(_LANES.value, triton.next_power_of_2(ids.numel())), _UNROLLED),
        num_warps=_WARPS[experts > 128],
        **pdl_args(ids.device, chained),
    )
    return where, cpu_ids
