"""The products of `kernels/grouped.py` on Hopper, with descriptors for weights and sorted rows.

For tables whose addresses are slots of one memory (`ExpertTable.slots`): a descriptor names a slot
by its number. Rows of x are gathered by pointers: they come from L2 as fast as by descriptor.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from spac.kernels.common import split_gate_up, store_hidden
from spac.kernels.config import Tile
from spac.kernels.dot import dot
from spac.kernels.plan import Plan, this_tile


@triton.jit
def _gate_up_tile(
    tile,
    used,
    n0,
    x_ptr,
    stride_xt,
    w_desc,
    h_ptr,
    pre_ptr,
    order_ptr,
    tile_row_ptr,
    tile_slot_ptr,
    alpha,
    limit,
    H,
    inter,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row0 = tl.load(tile_row_ptr + tile)
    slot = tl.load(tile_slot_ptr + tile)
    w0 = 2 * n0 if INTERLEAVED else n0
    offs_m = tl.arange(0, BLOCK_M)
    # Rows beyond the tile's last repeat that: the loads need no mask.
    pairs = tl.load(order_ptr + row0 + tl.minimum(offs_m, used - 1))
    x_ptrs = x_ptr + (pairs // K).to(tl.int64)[:, None] * stride_xt
    x_ptrs += tl.arange(0, BLOCK_K)[None, :]
    acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
    tl.assume(H > 0)  # else ptxas may let each matmul wait for the one before
    for k0 in range(0, H, BLOCK_K):
        x = tl.load(x_ptrs)
        w = w_desc.load([slot, 0, w0, k0]).reshape(2 * BLOCK_N, BLOCK_K).T
        acc = dot(x, w, acc)
        x_ptrs += BLOCK_K
    gate, up = split_gate_up(acc, BLOCK_M, BLOCK_N, INTERLEAVED)
    rows = (row0 + offs_m).to(tl.int64)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    mask = (offs_m < used)[:, None] & (offs_n < inter)[None, :]
    store_hidden(
        gate, up, rows, offs_n, mask, h_ptr, pre_ptr, alpha, limit, inter, ACTIVATION,
        INTERLEAVED, SAVE,
    )  # fmt: skip


@triton.jit
def _gate_up_tma_kernel(
    x_ptr,
    stride_xt,
    w_desc,
    h_ptr,
    pre_ptr,
    order_ptr,
    tile_row_ptr,
    tile_rows_ptr,
    tile_slot_ptr,
    alpha,
    limit,
    H,
    inter,
    blocks_n,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SMALL_M: tl.constexpr,
):
    """As `_gate_up_grouped_kernel`, on the same grid."""
    tile, block, used = this_tile(tile_rows_ptr, blocks_n)
    n0 = block * BLOCK_N
    if used <= 0:
        return
    if used <= SMALL_M:
        _gate_up_tile(
            tile, used, n0, x_ptr, stride_xt, w_desc, h_ptr, pre_ptr, order_ptr, tile_row_ptr,
            tile_slot_ptr, alpha, limit, H, inter, K, ACTIVATION, INTERLEAVED, SAVE,
            SMALL_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif SMALL_M < BLOCK_M:
        _gate_up_tile(
            tile, used, n0, x_ptr, stride_xt, w_desc, h_ptr, pre_ptr, order_ptr, tile_row_ptr,
            tile_slot_ptr, alpha, limit, H, inter, K, ACTIVATION, INTERLEAVED, SAVE,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _rows_tile(
    tile,
    used,
    n0,
    a_desc,
    w_desc,
    out_ptr,
    weights_ptr,
    order_ptr,
    tile_row_ptr,
    tile_slot_ptr,
    N,
    depth,
    WEIGHTED: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row0 = tl.load(tile_row_ptr + tile)
    slot = tl.load(tile_slot_ptr + tile)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tl.assume(depth > 0)  # else ptxas may let each matmul wait for the one before
    for k0 in range(0, depth, BLOCK_K):
        a = a_desc.load([row0, k0])  # rows beyond the tile's are another expert's: not stored
        if TURNED:
            w = w_desc.load([slot, k0, n0]).reshape(BLOCK_K, BLOCK_N)
        else:
            w = w_desc.load([slot, n0, k0]).reshape(BLOCK_N, BLOCK_K).T
        acc = dot(a, w, acc)
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < used
    pairs = tl.load(order_ptr + row0 + offs_m, mask=mask_m, other=0).to(tl.int64)
    if WEIGHTED:
        weight = tl.load(weights_ptr + pairs, mask=mask_m, other=0.0).to(tl.float32)
        acc = weight[:, None] * acc
    offs_n = n0 + tl.arange(0, BLOCK_N)
    out_ptrs = out_ptr + pairs[:, None] * N + offs_n[None, :]
    mask = mask_m[:, None] & (offs_n < N)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rows_tma_kernel(
    a_desc,
    a_small_desc,
    w_desc,
    out_ptr,
    weights_ptr,
    order_ptr,
    tile_row_ptr,
    tile_rows_ptr,
    tile_slot_ptr,
    N,
    depth,
    blocks_n,
    WEIGHTED: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SMALL_M: tl.constexpr,
):
    """As `_rows_kernel`, on the same grid."""
    tile, block, used = this_tile(tile_rows_ptr, blocks_n)
    n0 = block * BLOCK_N
    if used <= 0:
        return
    if used <= SMALL_M:
        _rows_tile(
            tile, used, n0, a_small_desc, w_desc, out_ptr, weights_ptr, order_ptr, tile_row_ptr,
            tile_slot_ptr, N, depth, WEIGHTED, TURNED, SMALL_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif SMALL_M < BLOCK_M:
        _rows_tile(
            tile, used, n0, a_desc, w_desc, out_ptr, weights_ptr, order_ptr, tile_row_ptr,
            tile_slot_ptr, N, depth, WEIGHTED, TURNED, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


def has_descriptors(table: Any, block_k: int = 64) -> bool:
    """Whether the weights of `table` can come through descriptors, in steps of `block_k`."""
    layout, slots = table.layout, table.slots
    if slots is None or slots.address is not table.address or table.copy_to is not None:
        return False
    if layout.transposed or layout.bias or layout.dtype == torch.float32:
        return False
    # Rows of the hidden layer [P, I] come through a descriptor as well.
    return (
        layout.hidden % block_k == 0
        and layout.intermediate % 8 == 0
        and all(
            w.stride(2) == 1 and not any(s % 8 for s in w.stride()[:2]) and w.data_ptr() % 16 == 0
            for w in (slots.gate_up, slots.down)
        )
    )


def gate_up_tma(
    x: Tensor, plan: Plan, table: Any, tile: Tile, h: Tensor, pre: Tensor | None = None
) -> None:
    """Fills h [P, I] and, if given, pre [P, 2I], as `grouped_gate_up`."""
    if not has_descriptors(table, tile.block_k):
        raise ValueError("config: this table cannot be read through descriptors")
    layout, w = table.layout, table.slots.gate_up
    H, inter, step = layout.hidden, layout.intermediate, w.stride(1)
    parts = 1 if layout.interleaved else 2
    blocks_n = triton.cdiv(inter, tile.block_n)
    _gate_up_tma_kernel[(plan.tiles * blocks_n,)](
        x,
        x.stride(0),
        TensorDescriptor(
            w,
            [w.shape[0], parts, 2 * inter // parts, H],
            [w.stride(0), inter * step, step, 1],
            [1, parts, 2 * tile.block_n // parts, tile.block_k],
        ),
        h,
        h if pre is None else pre,
        plan.order,
        plan.tile_row,
        plan.tile_rows,
        plan.tile_slot,
        alpha=layout.alpha,
        limit=layout.limit,
        H=H,
        inter=inter,
        blocks_n=blocks_n,
        K=plan.top_k,
        ACTIVATION=layout.activation,
        INTERLEAVED=layout.interleaved,
        SAVE=pre is not None,
        **tile.with_rows(plan.block_m),
    )


def rows_tma(
    a: Tensor,
    weights: Tensor | None,
    plan: Plan,
    w: Tensor,
    tile: Tile,
    out: Tensor,
    turned: bool = False,
) -> None:
    """out[pair(r)] = weight[pair(r)] * a[r] @ w_e.T, or @ w_e if `turned`; w of table.slots."""
    depth, N = a.shape[1], out.shape[1]
    n, k, rows = tile.block_n, tile.block_k, tile.with_rows(plan.block_m)
    blocks_n = triton.cdiv(N, n)
    _rows_tma_kernel[(plan.tiles * blocks_n,)](
        TensorDescriptor.from_tensor(a, [rows["BLOCK_M"], k]),
        TensorDescriptor.from_tensor(a, [rows["SMALL_M"], k]),
        TensorDescriptor(w, [*w.shape], [*w.stride()], [1, k, n] if turned else [1, n, k]),
        out,
        out if weights is None else weights,
        plan.order,
        plan.tile_row,
        plan.tile_rows,
        plan.tile_slot,
        N=N,
        depth=depth,
        blocks_n=blocks_n,
        WEIGHTED=weights is not None,
        TURNED=turned,
        **rows,
    )
