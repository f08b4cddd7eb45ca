"""Expert matmuls over pairs sorted by expert: the path of prefill and training.

`make_plan` sorts once; the plan is a value that every kernel of forward and backward reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spac.kernels.common import (
    activate,
    down_args,
    gate_up_args,
    gate_up_tile,
    matmul_tile,
    weight_pointer,
)
from spac.kernels.config import Tile


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
    """Sort ids [T, k] (contiguous) by expert, and cut each group into tiles of `block_m` rows."""
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
        plan.order,
        plan.offsets,
        plan.tile_expert,
        plan.tile_row,
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
def _gate_up_grouped_kernel(
    x_ptr,
    stride_xt,
    h_ptr,
    pre_ptr,
    order_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    address_ptr,
    gate_stride,
    gate_k_stride,
    up_offset,
    bias_offset,
    bias_skew,
    bias_stride,
    bias_up_offset,
    alpha,
    limit,
    K,
    H,
    inter,
    blocks_n,
    ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BIAS: tl.constexpr,
    ALIGN: tl.constexpr,
    SAVE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h[r] = act(gate_e x) * up_e x for the sorted rows r; SAVE keeps gate and up as well.

    Grid (tiles * blocks of inter,), the blocks of one tile side by side: they share x in L2.
    """
    pid = tl.program_id(0)
    tile = pid // blocks_n
    n0 = (pid - tile * blocks_n) * BLOCK_N
    e, rows, pairs, mask_m = tile_rows(
        order_ptr, offsets_ptr, tile_expert_ptr, tile_row_ptr, tile, BLOCK_M
    )
    if e < 0:
        return
    address = tl.load(address_ptr + e)
    gate, up = gate_up_tile(
        x_ptr,
        pairs // K,
        stride_xt,
        mask_m,
        weight_pointer(address, x_ptr, ALIGN),
        weight_pointer(address + bias_offset + e.to(tl.int64) * bias_skew, x_ptr, 1),
        gate_stride,
        gate_k_stride,
        up_offset,
        bias_stride,
        bias_up_offset,
        n0,
        H,
        inter,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EVEN_K,
        INTERLEAVED,
        BIAS,
    )
    offs_n = n0 + tl.arange(0, BLOCK_N)
    mask = mask_m[:, None] & (offs_n < inter)[None, :]
    if SAVE:
        columns = offs_n * (2 if INTERLEAVED else 1)
        pre_ptrs = pre_ptr + rows[:, None] * (2 * inter) + columns[None, :]
        tl.store(pre_ptrs, gate.to(pre_ptr.dtype.element_ty), mask=mask)
        pre_ptrs += 1 if INTERLEAVED else inter
        tl.store(pre_ptrs, up.to(pre_ptr.dtype.element_ty), mask=mask)
    h = activate(gate, up, alpha, limit, ACTIVATION)
    h_ptrs = h_ptr + rows[:, None] * inter + offs_n[None, :]
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rows_kernel(
    a_ptr,
    out_ptr,
    weights_ptr,
    order_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    address_ptr,
    w_offset,
    w_skew,
    stride_wn,
    stride_wk,
    bias_offset,
    bias_skew,
    N,
    depth,
    blocks_n,
    BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ALIGN: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[pair(r)] = weight[pair(r)] * (a[r] @ w_e.T + bias_e), a [P, depth], w_e [N, depth].

    Grid (tiles * blocks of N,).
    """
    pid = tl.program_id(0)
    tile = pid // blocks_n
    n0 = (pid - tile * blocks_n) * BLOCK_N
    e, rows, pairs, mask_m = tile_rows(
        order_ptr, offsets_ptr, tile_expert_ptr, tile_row_ptr, tile, BLOCK_M
    )
    if e < 0:
        return
    address = tl.load(address_ptr + e)
    wide = e.to(tl.int64)
    out = matmul_tile(
        a_ptr,
        rows,
        depth,
        mask_m,
        weight_pointer(address + w_offset + wide * w_skew, a_ptr, ALIGN),
        stride_wn,
        stride_wk,
        n0,
        N,
        depth,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EVEN_K,
    )
    offs_n = n0 + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if BIAS:
        bias_ptr = weight_pointer(address + bias_offset + wide * bias_skew, a_ptr, 1)
        out += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if WEIGHTED:
        weight = tl.load(weights_ptr + pairs, mask=mask_m, other=0.0).to(tl.float32)
        out = weight[:, None] * out
    out_ptrs = out_ptr + pairs[:, None] * N + offs_n[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def plan_args(plan: Plan) -> dict[str, Tensor]:
    return {
        "order_ptr": plan.order,
        "offsets_ptr": plan.offsets,
        "tile_expert_ptr": plan.tile_expert,
        "tile_row_ptr": plan.tile_row,
    }


def _with_rows(tile: Tile, plan: Plan) -> dict[str, int]:
    return tile.launch() | {"BLOCK_M": plan.block_m}


def grouped_gate_up(
    x: Tensor, plan: Plan, table: Any, tile: Tile, h: Tensor, pre: Tensor | None = None
) -> None:
    """Fills h [P, I] and, if given, pre [P, 2I] (gate and up, in stored row order), by row."""
    H, inter = x.shape[1], h.shape[1]
    blocks_n = triton.cdiv(inter, tile.block_n)
    _gate_up_grouped_kernel[(plan.tiles * blocks_n,)](
        x,
        x.stride(0),
        h,
        h if pre is None else pre,
        K=plan.top_k,
        H=H,
        inter=inter,
        blocks_n=blocks_n,
        SAVE=pre is not None,
        EVEN_K=H % tile.block_k == 0,
        **plan_args(plan),
        **gate_up_args(table),
        **_with_rows(tile, plan),
    )


def grouped_rows(
    a: Tensor, weights: Tensor | None, plan: Plan, weight_args: dict, tile: Tile, out: Tensor
) -> None:
    """Fills out [P, N] at the pairs of a's sorted rows; `weight_args` as from `down_args`."""
    depth, N = a.shape[1], out.shape[1]
    blocks_n = triton.cdiv(N, tile.block_n)
    _rows_kernel[(plan.tiles * blocks_n,)](
        a,
        out,
        out if weights is None else weights,
        N=N,
        depth=depth,
        blocks_n=blocks_n,
        WEIGHTED=weights is not None,
        EVEN_K=depth % tile.block_k == 0,
        **plan_args(plan),
        **weight_args,
        **_with_rows(tile, plan),
    )


def grouped_down(
    h: Tensor, weights: Tensor, plan: Plan, table: Any, tile: Tile, out: Tensor
) -> None:
    """out[pair] = weights[pair] * (down_e h[row] + bias_e); out [P, H]."""
    grouped_rows(h, weights, plan, down_args(table), tile, out)
