"""Pairs sorted by expert and cut into tiles: made once, read by every grouped kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PART = 256  # pairs that are compared with each other
CHUNKS = 256  # at most, or else the counts of all chunks are too much to read for each program
DIRECT = 4096  # up to so many pairs every program counts all, in one launch


@dataclass(frozen=True)
class Plan:
    """Pairs of one forward sorted by expert, and the row tiles over them.

    order int32 [P] (sorted row -> pair t * k + j; rows from offsets[E] on are not written),
    offsets int32 [E + 1]. Of each tile, all [tiles]: expert int32 (-1 = none), first row int32,
    rows int32 (negative: nobody computes them, for their expert is not here; the tile after the
    last used one has the first rows without an expert), slot int32 of its expert in the table's
    `slots`.
    """

    order: Tensor
    offsets: Tensor
    tile_expert: Tensor
    tile_row: Tensor
    tile_rows: Tensor
    tile_slot: Tensor
    top_k: int
    block_m: int

    @property
    def tiles(self) -> int:
        return self.tile_expert.numel()


@triton.jit
def _count_kernel(ids_ptr, counts_ptr, num_pairs, E, BINS: tl.constexpr, CHUNK: tl.constexpr):
    """counts[chunk, e] of the pairs of each chunk. Grid (chunks,)."""
    chunk = tl.program_id(0)
    offs_p = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + offs_p, mask=offs_p < num_pairs, other=-1)
    valid = (ids >= 0) & (ids < E)
    counts = tl.histogram(tl.where(valid, ids, 0).to(tl.int32), BINS, mask=valid)
    tl.store(counts_ptr + chunk * BINS + tl.arange(0, BINS), counts.to(counts_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["tiles", "chunks"])
def _place_kernel(
    ids_ptr,
    counts_ptr,
    address_ptr,
    order_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    tile_rows_ptr,
    tile_slot_ptr,
    base,
    skew,
    num_pairs,
    E,
    tiles,
    chunks,
    DIRECT: tl.constexpr,
    BINS: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Counting sort, stable. Program e cuts expert e into tiles.

    DIRECT: pairs to count, all in one step, and program e places its own. Grid (E,).
    0: `counts` has them by chunk, and program E + i places chunk i. Grid (E + chunks,).
    """
    e = tl.program_id(0)
    chunk = e - E
    offs_b = tl.arange(0, BINS)
    if DIRECT:
        offs_p = tl.arange(0, DIRECT)
        all_ids = tl.load(ids_ptr + offs_p, mask=offs_p < num_pairs, other=-1)
        known = (all_ids >= 0) & (all_ids < E)
        totals = tl.histogram(tl.where(known, all_ids, 0).to(tl.int32), BINS, mask=known)
    else:
        totals = tl.zeros((BINS,), tl.int32)
        before = tl.zeros((BINS,), tl.int32)
        for c0 in range(0, chunks, STEP):
            offs_c = c0 + tl.arange(0, STEP)
            count_ptrs = counts_ptr + offs_c[:, None] * BINS + offs_b[None, :]
            counts = tl.load(count_ptrs, mask=(offs_c < chunks)[:, None], other=0).to(tl.int32)
            totals += tl.sum(counts, axis=0)
            before += tl.sum(tl.where((offs_c < chunk)[:, None], counts, 0), axis=0)
    begins = tl.cumsum(totals, axis=0) - totals
    if e < E:
        tile_counts = tl.cdiv(totals, BLOCK_M)
        begin = tl.sum(tl.where(offs_b == e, begins, 0), axis=0)
        count = tl.sum(tl.where(offs_b == e, totals, 0), axis=0)
        tile_begin = tl.sum(tl.where(offs_b < e, tile_counts, 0), axis=0)
        tile_count = tl.cdiv(count, BLOCK_M)
        address = tl.load(address_ptr + e)
        slot = ((address - base) // skew).to(tl.int32)
        tl.store(offsets_ptr + e, begin)
        if DIRECT:
            mine = (all_ids == e).to(tl.int32)
            rank = tl.cumsum(mine, axis=0) - mine
            tl.store(order_ptr + begin + rank, offs_p, mask=mine != 0)
        for t0 in range(0, tile_count, BLOCK_T):
            offs_t = t0 + tl.arange(0, BLOCK_T)
            mask_t = offs_t < tile_count
            rows = tl.minimum(count - offs_t * BLOCK_M, BLOCK_M)
            to = tile_begin + offs_t
            tl.store(tile_expert_ptr + to, tl.where(address != 0, e, -1), mask=mask_t)
            tl.store(tile_row_ptr + to, begin + offs_t * BLOCK_M, mask=mask_t)
            tl.store(tile_rows_ptr + to, tl.where(address != 0, rows, -rows), mask=mask_t)
            tl.store(tile_slot_ptr + to, tl.zeros((BLOCK_T,), tl.int32) + slot, mask=mask_t)
        if e == E - 1:
            end, unused = begin + count, tile_begin + tile_count
            tl.store(offsets_ptr + E, end)
            for t0 in range(unused, tiles, BLOCK_T):
                offs_t = t0 + tl.arange(0, BLOCK_T)
                mask_t = offs_t < tiles
                none = tl.zeros((BLOCK_T,), tl.int32)
                rest = tl.where(offs_t == unused, tl.minimum(num_pairs - end, BLOCK_M), 0)
                tl.store(tile_expert_ptr + offs_t, none - 1, mask=mask_t)
                tl.store(tile_row_ptr + offs_t, none + end, mask=mask_t)
                tl.store(tile_rows_ptr + offs_t, -rest, mask=mask_t)
                tl.store(tile_slot_ptr + offs_t, none, mask=mask_t)
    elif DIRECT == 0:
        place = begins + before
        for part in tl.static_range(PARTS):
            first = (chunk * PARTS + part) * PART
            offs_i = tl.arange(0, PART)
            ids = tl.load(ids_ptr + first + offs_i, mask=first + offs_i < num_pairs, other=-1)
            earlier = tl.zeros((PART, 32), tl.int32)
            for j0 in tl.static_range(0, PART, 32):
                offs_j = j0 + tl.arange(0, 32)
                others = tl.load(
                    ids_ptr + first + offs_j, mask=first + offs_j < num_pairs, other=-1
                )
                same = others[None, :] == ids[:, None]
                earlier += (same & (offs_j[None, :] < offs_i[:, None])).to(tl.int32)
            known = (ids >= 0) & (ids < E)
            bins = tl.where(known, ids, 0).to(tl.int32)
            to = tl.gather(place, bins, axis=0) + tl.sum(earlier, axis=1)
            tl.store(order_ptr + to, first + offs_i, mask=known)
            if part + 1 < PARTS:
                place += tl.histogram(bins, BINS, mask=known)


def make_plan(ids: Tensor, table: Any, block_m: int) -> Plan:
    """Sort ids [T, k] (contiguous) by expert, stably; tiles of `block_m` rows of each group."""
    E, pairs = table.layout.num_experts, ids.numel()
    tiles = pairs // block_m + min(E, pairs) + 1
    sizes = (pairs, E + 1, tiles, tiles, tiles, tiles)
    order, offsets, expert, row, rows, slot = (
        torch.empty(n, dtype=torch.int32, device=ids.device) for n in sizes
    )
    plan = Plan(order, offsets, expert, row, rows, slot, top_k=ids.shape[1], block_m=block_m)
    base, skew = (0, 1) if table.slots is None else table.slots.span
    bins = max(2, triton.next_power_of_2(E))
    parts = triton.next_power_of_2(triton.cdiv(pairs, CHUNKS * PART))
    chunks = triton.cdiv(pairs, parts * PART)
    direct = pairs <= DIRECT
    counts = offsets
    if not direct:
        small = torch.int16 if parts * PART < 2**15 else torch.int32
        counts = torch.empty(chunks, bins, dtype=small, device=ids.device)
        _count_kernel[(chunks,)](ids, counts, pairs, E, BINS=bins, CHUNK=parts * PART, num_warps=4)
    _place_kernel[(E if direct else E + chunks,)](
        ids,
        counts,
        table.address,
        order,
        offsets,
        expert,
        row,
        rows,
        slot,
        base,
        skew,
        num_pairs=pairs,
        E=E,
        tiles=tiles,
        chunks=chunks,
        DIRECT=max(1024, triton.next_power_of_2(pairs)) if direct else 0,
        BINS=bins,
        PART=PART,
        PARTS=parts,
        STEP=max(1, 16384 // bins),
        BLOCK_M=block_m,
        BLOCK_T=64,
        num_warps=8,
    )
    return plan


def plan_args(plan: Plan) -> dict[str, Tensor]:
    return {
        "order_ptr": plan.order,
        "tile_expert_ptr": plan.tile_expert,
        "tile_row_ptr": plan.tile_row,
        "tile_rows_ptr": plan.tile_rows,
    }


@triton.jit
def this_tile(tile_rows_ptr, blocks_n):
    """Of a grid (tiles * blocks of columns,): the program's tile, its block, the rows in use."""
    pid = tl.program_id(0)
    tile = pid // blocks_n
    return tile, pid - tile * blocks_n, tl.load(tile_rows_ptr + tile)


@triton.jit
def tile_rows(order_ptr, tile_row_ptr, tile, used, BLOCK_M: tl.constexpr):
    """Sorted rows, pairs and row mask of a tile of a Plan with `used` rows."""
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < used
    rows = tl.load(tile_row_ptr + tile) + offs_m
    pairs = tl.load(order_ptr + rows, mask=mask_m, other=0)
    return rows.to(tl.int64), pairs.to(tl.int64), mask_m


@triton.jit
def tile_copies_to(copy_to_ptr, tile_expert_ptr, tile, e, address, COPY: tl.constexpr):
    """Where this tile stores the weights it reads: an expert's first tile does it, others 0."""
    if COPY:
        before = tl.load(tile_expert_ptr + tl.maximum(tile - 1, 0))
        return tl.where((tile == 0) | (before != e), tl.load(copy_to_ptr + e), 0)
    else:
        return address
