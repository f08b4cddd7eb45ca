"""Expert matmuls over pairs sorted by expert: the path of prefill and training."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from spac.kernels.common import (
    copy_args,
    down_args,
    gate_up_args,
    gate_up_tile,
    matmul_tile,
    store_hidden,
    weight_pointer,
)
from spac.kernels.config import Tile
from spac.kernels.dequant import quantized_args
from spac.kernels.plan import Plan, plan_args, this_tile, tile_copies_to, tile_rows


@triton.jit
def _gate_up_rows(
    tile,
    used,
    n0,
    x_ptr,
    stride_xt,
    h_ptr,
    pre_ptr,
    order_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    address_ptr,
    copy_to_ptr,
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
    ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BIAS: tl.constexpr,
    ALIGN: tl.constexpr,
    COPY: tl.constexpr,
    SAVE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    scale_offset,
    GROUP: tl.constexpr,
):
    e = tl.load(tile_expert_ptr + tile)
    rows, pairs, mask_m = tile_rows(order_ptr, tile_row_ptr, tile, used, BLOCK_M)
    address = tl.load(address_ptr + e)
    bias_at = bias_offset + e.to(tl.int64) * bias_skew
    copy_to = tile_copies_to(copy_to_ptr, tile_expert_ptr, tile, e, address, COPY)
    gate, up = gate_up_tile(
        x_ptr,
        pairs // K,
        stride_xt,
        mask_m,
        weight_pointer(address, x_ptr, ALIGN),
        weight_pointer(address + bias_at, x_ptr, 1),
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
        weight_pointer(copy_to, x_ptr, ALIGN),
        weight_pointer(copy_to + bias_at, x_ptr, 1),
        copy_to != 0,
        COPY,
        scale_offset,
        GROUP,
    )
    offs_n = n0 + tl.arange(0, BLOCK_N)
    mask = mask_m[:, None] & (offs_n < inter)[None, :]
    store_hidden(
        gate, up, rows, offs_n, mask, h_ptr, pre_ptr, alpha, limit, inter, ACTIVATION,
        INTERLEAVED, SAVE,
    )  # fmt: skip


@triton.jit
def _gate_up_grouped_kernel(
    x_ptr,
    stride_xt,
    h_ptr,
    pre_ptr,
    order_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    tile_rows_ptr,
    address_ptr,
    copy_to_ptr,
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
    COPY: tl.constexpr,
    SAVE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SMALL_M: tl.constexpr,
    scale_offset=0,
    GROUP: tl.constexpr = 0,
):
    """h[r] = act(gate_e x) * up_e x for the sorted rows r; SAVE keeps gate and up as well.

    Grid (tiles * blocks of inter,), the blocks of one tile side by side: they share x in L2.
    """
    tile, block, used = this_tile(tile_rows_ptr, blocks_n)
    n0 = block * BLOCK_N
    if used <= 0:
        return
    if used <= SMALL_M:
        _gate_up_rows(
            tile, used, n0, x_ptr, stride_xt, h_ptr, pre_ptr, order_ptr, tile_expert_ptr,
            tile_row_ptr, address_ptr, copy_to_ptr, gate_stride, gate_k_stride, up_offset,
            bias_offset, bias_skew, bias_stride, bias_up_offset, alpha, limit, K, H, inter,
            ACTIVATION, INTERLEAVED, BIAS, ALIGN, COPY, SAVE, EVEN_K, SMALL_M, BLOCK_N, BLOCK_K,
            scale_offset, GROUP,
        )  # fmt: skip
    elif SMALL_M < BLOCK_M:
        _gate_up_rows(
            tile, used, n0, x_ptr, stride_xt, h_ptr, pre_ptr, order_ptr, tile_expert_ptr,
            tile_row_ptr, address_ptr, copy_to_ptr, gate_stride, gate_k_stride, up_offset,
            bias_offset, bias_skew, bias_stride, bias_up_offset, alpha, limit, K, H, inter,
            ACTIVATION, INTERLEAVED, BIAS, ALIGN, COPY, SAVE, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
            scale_offset, GROUP,
        )  # fmt: skip


@triton.jit
def _matmul_rows(
    tile,
    used,
    n0,
    a_ptr,
    out_ptr,
    weights_ptr,
    order_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    address_ptr,
    copy_to_ptr,
    w_offset,
    w_skew,
    stride_wn,
    stride_wk,
    bias_offset,
    bias_skew,
    N,
    depth,
    BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ALIGN: tl.constexpr,
    COPY: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    scale_offset,
    GROUP: tl.constexpr,
):
    e = tl.load(tile_expert_ptr + tile)
    rows, pairs, mask_m = tile_rows(order_ptr, tile_row_ptr, tile, used, BLOCK_M)
    address = tl.load(address_ptr + e)
    w_at = w_offset + e.to(tl.int64) * w_skew
    bias_at = bias_offset + e.to(tl.int64) * bias_skew
    copy_to = tile_copies_to(copy_to_ptr, tile_expert_ptr, tile, e, address, COPY)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    out = matmul_tile(
        a_ptr,
        rows,
        depth,
        mask_m,
        weight_pointer(address + w_at, a_ptr, ALIGN),
        offs_n.to(tl.int64) * stride_wn,
        mask_n,
        stride_wk,
        depth,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EVEN_K,
        weight_pointer(copy_to + w_at, a_ptr, ALIGN),
        copy_to != 0,
        COPY,
        scale_offset,
        offs_n,
        GROUP,
    )
    if BIAS:
        bias_ptr = weight_pointer(address + bias_at, a_ptr, 1)
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)
        out += bias.to(tl.float32)[None, :]
        if COPY:
            bias_ptr = weight_pointer(copy_to + bias_at, a_ptr, 1)
            tl.store(bias_ptr + offs_n, bias, mask=offs_n < tl.where(copy_to != 0, N, 0))
    if WEIGHTED:
        weight = tl.load(weights_ptr + pairs, mask=mask_m, other=0.0).to(tl.float32)
        out = weight[:, None] * out
    out_ptrs = out_ptr + pairs[:, None] * N + offs_n[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _rows_kernel(
    a_ptr,
    out_ptr,
    weights_ptr,
    order_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    tile_rows_ptr,
    address_ptr,
    copy_to_ptr,
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
    COPY: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SMALL_M: tl.constexpr,
    scale_offset=0,
    GROUP: tl.constexpr = 0,
):
    """out[pair(r)] = weight[pair(r)] * (a[r] @ w_e.T + bias_e), a [P, depth], w_e [N, depth].

    Grid (tiles * blocks of N,).
    """
    tile, block, used = this_tile(tile_rows_ptr, blocks_n)
    n0 = block * BLOCK_N
    if used <= 0:
        return
    if used <= SMALL_M:
        _matmul_rows(
            tile, used, n0, a_ptr, out_ptr, weights_ptr, order_ptr, tile_expert_ptr,
            tile_row_ptr, address_ptr, copy_to_ptr, w_offset, w_skew, stride_wn, stride_wk,
            bias_offset, bias_skew, N, depth, BIAS, WEIGHTED, ALIGN, COPY, EVEN_K,
            SMALL_M, BLOCK_N, BLOCK_K,
            scale_offset, GROUP,
        )  # fmt: skip
    elif SMALL_M < BLOCK_M:
        _matmul_rows(
            tile, used, n0, a_ptr, out_ptr, weights_ptr, order_ptr, tile_expert_ptr,
            tile_row_ptr, address_ptr, copy_to_ptr, w_offset, w_skew, stride_wn, stride_wk,
            bias_offset, bias_skew, N, depth, BIAS, WEIGHTED, ALIGN, COPY, EVEN_K,
            BLOCK_M, BLOCK_N, BLOCK_K,
            scale_offset, GROUP,
        )  # fmt: skip


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
        **copy_args(table),
        **gate_up_args(table),
        **quantized_args(table, "gate_up"),
        **tile.with_rows(plan.block_m),
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
        **tile.with_rows(plan.block_m),
    )


def grouped_down(
    h: Tensor, weights: Tensor, plan: Plan, table: Any, tile: Tile, out: Tensor
) -> None:
    """out[pair] = weights[pair] * (down_e h[row] + bias_e); out [P, H]."""
    rows = down_args(table) | copy_args(table) | quantized_args(table, "down")
    grouped_rows(h, weights, plan, rows, tile, out)
