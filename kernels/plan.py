"""Pairs sorted by expert and cut into tiles: made once, read by every grouped kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


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


def make_plan(ids: Tensor, table: Any, block_m: int) -> Plan:
    """Sort ids [T, k] (contiguous) by expert, stably; tiles of `block_m` rows of each group."""
    E, pairs = table.layout.num_experts, ids.numel()
    tiles = pairs // block_m + min(E, pairs)
    sizes = (pairs, E + 1, tiles, tiles)
    order, offsets, expert, row = (
        torch.empty(n, dtype=torch.int32, device=ids.device) for n in sizes
    )
    plan = Plan(order, offsets, expert, row, top_k=ids.shape[1], block_m=block_m)
    _plan_kernel[(E,)](
        ids,
        table.address,
        *plan_args(plan).values(),
        num_pairs=pairs,
        E=E,
        tiles=tiles,
        BINS=triton.next_power_of_2(E + 1),
        CHUNK=min(4096, max(1024, triton.next_power_of_2(pairs))),
        BLOCK_M=block_m,
        BLOCK_T=64,
        num_warps=8,
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
