"""Pairs sorted by expert and cut into tiles: made once, read by every grouped kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ONE_LAUNCH = 8192  # pairs: beyond, two launches are faster than E programs that read all pairs


@dataclass(frozen=True)
class Plan:
    """Pairs of one forward sorted by expert, and the row tiles over them.

    order int32 [P] (sorted row -> pair t * k + j; rows from offsets[E] on are not written),
    offsets int32 [E + 1], tile_expert and tile_row int32 [tiles] (-1 = unused tile).
    """

    order: Tensor
    offsets: Tensor
    tile_expert: Tensor
    tile_row: Tensor
    top_k: int
    block_m: int

    @property
    def tiles(self) -> int:
        return self.tile_expert.numel()


@triton.jit(do_not_specialize=["tiles"])
def _plan_kernel(
    ids_ptr,
    address_ptr,
    order_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_pairs,
    E,
    tiles,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Counting sort, stable. Grid (E,): program e counts all pairs, then places its own."""
    e = tl.program_id(0)
    offs_b = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for p0 in range(0, num_pairs, CHUNK):
        offs_p = p0 + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + offs_p, mask=offs_p < num_pairs, other=-1)
        bins = tl.where((ids >= 0) & (ids < E), ids, E).to(tl.int32)
        counts += tl.histogram(bins, BINS)
    counts = tl.where(offs_b < E, counts, 0)
    begin = tl.sum(tl.where(offs_b < e, counts, 0), axis=0)
    count = tl.sum(tl.where(offs_b == e, counts, 0), axis=0)
    tile_counts = tl.cdiv(counts, BLOCK_M)
    tile_begin = tl.sum(tl.where(offs_b < e, tile_counts, 0), axis=0)
    tile_count = tl.cdiv(count, BLOCK_M)
    tl.store(offsets_ptr + e, begin)
    here = tl.load(address_ptr + e) != 0
    for t0 in range(0, tile_count, BLOCK_T):
        offs_t = t0 + tl.arange(0, BLOCK_T)
        mask_t = offs_t < tile_count
        tl.store(tile_expert_ptr + tile_begin + offs_t, tl.where(here, e, -1), mask=mask_t)
        tl.store(tile_row_ptr + tile_begin + offs_t, begin + offs_t * BLOCK_M, mask=mask_t)
    if e == E - 1:
        tl.store(offsets_ptr + E, begin + count)
        for t0 in range(tile_begin + tile_count, tiles, BLOCK_T):
            offs_t = t0 + tl.arange(0, BLOCK_T)
            unused = tl.full((BLOCK_T,), -1, tl.int32)
            tl.store(tile_expert_ptr + offs_t, unused, mask=offs_t < tiles)
            tl.store(tile_row_ptr + offs_t, unused + 1, mask=offs_t < tiles)
    placed = begin
    for p0 in range(0, num_pairs, CHUNK):
        offs_p = p0 + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + offs_p, mask=offs_p < num_pairs, other=-1)
        hit = (ids == e).to(tl.int32)
        rank = tl.cumsum(hit, axis=0) - hit
        tl.store(order_ptr + placed + rank, offs_p, mask=hit != 0)
        placed += tl.sum(hit, axis=0)


@triton.jit
def _histogram_kernel(ids_ptr, counts_ptr, num_pairs, E, BINS: tl.constexpr, CHUNK: tl.constexpr):
    """counts[c, e]: pairs of expert e in chunk c; bin E counts the rest. Grid (chunks,)."""
    c = tl.program_id(0)
    offs_p = c * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + offs_p, mask=offs_p < num_pairs, other=-1)
    bins = tl.where((ids >= 0) & (ids < E), ids, E).to(tl.int32)
    tl.store(counts_ptr + c * BINS + tl.arange(0, BINS), tl.histogram(bins, BINS))


@triton.jit(do_not_specialize=["tiles"])
def _place_kernel(
    ids_ptr,
    address_ptr,
    counts_ptr,
    order_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_pairs,
    E,
    tiles,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Places the pairs of one chunk and writes BLOCK_T tiles. Grid (chunks,)."""
    c = tl.program_id(0)
    chunks = tl.num_programs(0)
    offs_b = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    before = tl.zeros((BINS,), tl.int32)
    for c0 in range(0, chunks, BLOCK_C):
        offs_c = c0 + tl.arange(0, BLOCK_C)
        counts_ptrs = counts_ptr + offs_c[:, None] * BINS + offs_b[None, :]
        counts = tl.load(counts_ptrs, mask=(offs_c < chunks)[:, None], other=0)
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((offs_c < c)[:, None], counts, 0), axis=0)
    total = tl.where(offs_b < E, total, 0)
    begin = tl.cumsum(total, axis=0) - total

    offs_p = c * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + offs_p, mask=offs_p < num_pairs, other=-1)
    valid = (ids >= 0) & (ids < E)
    bins = tl.where(valid, ids, E).to(tl.int32)
    place = tl.gather(begin + before, bins, axis=0)
    for q0 in range(c * CHUNK, (c + 1) * CHUNK, 32):
        offs_q = q0 + tl.arange(0, 32)
        other = tl.load(ids_ptr + offs_q, mask=offs_q < num_pairs, other=-1)
        same = (other[None, :] == ids[:, None]) & (offs_q[None, :] < offs_p[:, None])
        place += tl.sum(same.to(tl.int32), axis=1)
    tl.store(order_ptr + place, offs_p, mask=valid)

    if c == 0:
        tl.store(offsets_ptr + offs_b, begin, mask=offs_b <= E)
    tile_counts = tl.cdiv(total, BLOCK_M)
    tile_end = tl.cumsum(tile_counts, axis=0)
    offs_t = c * BLOCK_T + tl.arange(0, BLOCK_T)
    passed = (tile_end[None, :] <= offs_t[:, None]) & (offs_b < E)[None, :]
    e = tl.sum(passed.to(tl.int32), axis=1)
    used = e < E
    here = tl.load(address_ptr + tl.where(used, e, 0)) != 0
    first = tl.gather(tile_end - tile_counts, e, axis=0)
    rows = tl.gather(begin, e, axis=0) + (offs_t - first) * BLOCK_M
    mask_t = offs_t < tiles
    tl.store(tile_expert_ptr + offs_t, tl.where(used & here, e, -1), mask=mask_t)
    tl.store(tile_row_ptr + offs_t, tl.where(used, rows, 0), mask=mask_t)


def make_plan(ids: Tensor, table: Any, block_m: int) -> Plan:
    """Sort ids [T, k] (contiguous) by expert, stably; tiles of `block_m` rows of each group."""
    E, pairs = table.layout.num_experts, ids.numel()
    tiles = pairs // block_m + min(E, pairs)
    sizes = (pairs, E + 1, tiles, tiles)
    order, offsets, expert, row = (
        torch.empty(n, dtype=torch.int32, device=ids.device) for n in sizes
    )
    plan = Plan(order, offsets, expert, row, top_k=ids.shape[1], block_m=block_m)
    bins = triton.next_power_of_2(E + 1)
    common = {"num_pairs": pairs, "E": E, "BINS": bins}
    if pairs <= ONE_LAUNCH:
        _plan_kernel[(E,)](
            ids,
            table.address,
            *plan_args(plan).values(),
            tiles=tiles,
            CHUNK=min(4096, max(1024, triton.next_power_of_2(pairs))),
            BLOCK_M=block_m,
            BLOCK_T=64,
            num_warps=8,
            **common,
        )
        return plan
    chunk = max(512, triton.next_power_of_2(pairs) // 128)
    chunks = triton.cdiv(pairs, chunk)
    counts = torch.empty(chunks, bins, dtype=torch.int32, device=ids.device)
    _histogram_kernel[(chunks,)](ids, counts, CHUNK=chunk, num_warps=8, **common)
    _place_kernel[(chunks,)](
        ids,
        table.address,
        counts,
        *plan_args(plan).values(),
        tiles=tiles,
        CHUNK=chunk,
        BLOCK_C=16,
        BLOCK_M=block_m,
        BLOCK_T=triton.next_power_of_2(triton.cdiv(tiles, chunks)),
        num_warps=8,
        **common,
    )
    return plan


def plan_args(plan: Plan) -> dict[str, Tensor]:
    return {
        "order_ptr": plan.order,
        "offsets_ptr": plan.offsets,
        "tile_expert_ptr": plan.tile_expert,
        "tile_row_ptr": plan.tile_row,
    }


@triton.jit
def tile_rows(order_ptr, offsets_ptr, tile_expert_ptr, tile_row_ptr, tile, BLOCK_M: tl.constexpr):
    """Expert (-1 = none), sorted rows, pairs and row mask of one tile of a Plan."""
    e = tl.load(tile_expert_ptr + tile)
    safe = tl.maximum(e, 0)
    rows = tl.load(tile_row_ptr + tile) + tl.arange(0, BLOCK_M)
    mask_m = rows < tl.where(e < 0, 0, tl.load(offsets_ptr + safe + 1))
    pairs = tl.load(order_ptr + rows, mask=mask_m, other=0)
    return e, rows.to(tl.int64), pairs.to(tl.int64), mask_m


@triton.jit
def rows_in_tile(offsets_ptr, tile_expert_ptr, tile_row_ptr, tile, BLOCK_M: tl.constexpr):
    """How many of a tile's rows are in use; 0 if it has no expert here."""
    e = tl.load(tile_expert_ptr + tile)
    end = tl.load(offsets_ptr + tl.maximum(e, 0) + 1)
    return tl.where(e < 0, 0, tl.minimum(end - tl.load(tile_row_ptr + tile), BLOCK_M))


@triton.jit
def tile_copies_to(copy_to_ptr, offsets_ptr, tile_row_ptr, tile, e, address, COPY: tl.constexpr):
    """Where this tile stores the weights it reads: an expert's first tile does it, others 0."""
    if COPY:
        first = tl.load(tile_row_ptr + tile) == tl.load(offsets_ptr + e)
        return tl.where(first, tl.load(copy_to_ptr + e), 0)
    else:
        return address
