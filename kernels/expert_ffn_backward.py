"""Gradients of the expert FFN, over the pairs sorted by expert; no atomics.

With row r the pair (t, e) of routing weight w, a = act(pre), out = down_e a + bias:
    g = down_e^T dy_t          dw = a . g + bias . dy_t
    d_pre = act'(pre) * w g    dx_t += gate_up_e^T d_pre
    d_gate_up_e += d_pre x_t^T d_down_e += dy_t (w a)^T
`_hidden_grad_kernel` makes d_pre, w a and pieces of dw in one pass; `out` is never needed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spac.kernels.common import (
    check_pairs,
    down_args,
    matmul_tile,
    store_hidden_grad,
    weight_pointer,
)
from spac.kernels.config import FFNConfig, Tile
from spac.kernels.expert_ffn import choose, save_hidden
from spac.kernels.grouped import grouped_rows
from spac.kernels.grouped_grad import grouped_bias_grad, grouped_outer
from spac.kernels.grouped_grad_tma import hidden_grad_tma, outer_tma
from spac.kernels.grouped_tma import rows_tma
from spac.kernels.plan import Plan, plan_args, this_tile, tile_rows
from spac.kernels.sum_pairs import sum_pairs


@triton.jit
def _hidden_grad_kernel(
    dy_ptr,
    weights_ptr,
    pre_ptr,
    d_pre_ptr,
    wa_ptr,
    dot_ptr,
    order_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    tile_rows_ptr,
    address_ptr,
    w_offset,
    w_skew,
    stride_wn,
    stride_wk,
    bias_offset,
    bias_skew,
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
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """d_pre, w * a by sorted row; dot[pair, block of inter] = this block's share of a . g."""
    tile, block, used = this_tile(tile_rows_ptr, blocks_n)
    if used <= 0:
        return
    e = tl.load(tile_expert_ptr + tile)
    rows, pairs, mask_m = tile_rows(order_ptr, tile_row_ptr, tile, used, BLOCK_M)
    address = tl.load(address_ptr + e) + w_offset + e.to(tl.int64) * w_skew
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    # down is [H, inter]: here inter is the column and H the depth.
    g = matmul_tile(
        dy_ptr,
        pairs // K,
        H,
        mask_m,
        weight_pointer(address, dy_ptr, ALIGN),
        offs_n.to(tl.int64) * stride_wk,
        offs_n < inter,
        stride_wn,
        H,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EVEN_K,
    )
    weight = tl.load(weights_ptr + pairs, mask=mask_m, other=0.0).to(tl.float32)[:, None]
    dots = store_hidden_grad(
        g, rows, offs_n, mask_m, weight, pre_ptr, d_pre_ptr, wa_ptr, alpha, limit, inter,
        ACTIVATION, INTERLEAVED,
    )  # fmt: skip
    tl.store(dot_ptr + pairs * blocks_n + block, dots, mask=mask_m)


@triton.jit
def _weight_grad_kernel(
    dot_ptr,
    dy_ptr,
    ids_ptr,
    dw_ptr,
    address_ptr,
    w_offset,
    w_skew,
    stride_wn,
    stride_wk,
    bias_offset,
    bias_skew,
    num_pairs,
    K,
    E,
    H,
    blocks,
    BIAS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dw[p] = sum of dot[p, :] + bias_e . dy_t; 0 for pairs without an expert here.

    Grid (blocks of pairs,).
    """
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < num_pairs
    ids = tl.load(ids_ptr + offs_p, mask=mask_p, other=-1)
    valid = (ids >= 0) & (ids < E)
    e = tl.where(valid, ids, 0).to(tl.int64)
    address = tl.load(address_ptr + e)
    here = valid & (address != 0)
    offs_b = tl.arange(0, BLOCKS)
    mask = here[:, None] & (offs_b < blocks)[None, :]
    dots = tl.load(
        dot_ptr + offs_p.to(tl.int64)[:, None] * blocks + offs_b[None, :], mask=mask, other=0.0
    )
    dw = tl.sum(dots, axis=1)
    if BIAS:
        bias_ptr = weight_pointer(address + bias_offset + e * bias_skew, dy_ptr, 1)
        t = (offs_p // K).to(tl.int64)
        for h0 in range(0, H, BLOCK_H):
            offs_h = h0 + tl.arange(0, BLOCK_H)
            mask_h = here[:, None] & (offs_h < H)[None, :]
            bias = tl.load(bias_ptr[:, None] + offs_h[None, :], mask=mask_h, other=0.0)
            dy = tl.load(dy_ptr + t[:, None] * H + offs_h[None, :], mask=mask_h, other=0.0)
            dw += tl.sum(bias.to(tl.float32) * dy.to(tl.float32), axis=1)
    tl.store(dw_ptr + offs_p, dw.to(dw_ptr.dtype.element_ty), mask=mask_p)


def _stored_rows_args(table: Any) -> dict[str, Any]:
    """The gate_up matrix as the `w` of `grouped_rows` for dx: [H, 2I], in stored row order."""
    layout = table.layout
    row = table.up_offset if layout.interleaved else table.gate_stride
    if not layout.interleaved and table.up_offset != layout.intermediate * row:
        raise ValueError(
            f"table: the up rows must follow the gate rows for a backward pass, "
            f"got up_offset {table.up_offset}, expected {layout.intermediate * row}"
        )
    return down_args(table) | {
        "w_offset": 0,
        "w_skew": 0,
        "stride_wn": table.gate_k_stride,
        "stride_wk": row,
        "BIAS": False,
        "ALIGN": table.align,
        "copy_to_ptr": table.address,
        "COPY": False,
    }


def expert_ffn_backward(
    dy: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    table: Any,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    saved: tuple | None = None,
    config: FFNConfig | None = None,
    frozen: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweights, dgate_up, ddown, dgate_up_bias, ddown_bias) for dy [T, H].

    Those of weights and biases are None if these are `frozen`.

    `saved` is what `expert_ffn_train` returned; without it the hidden layer is computed again.
    The weights are read through `table`; gate_up, down and the biases give the shape and strides
    of their gradients, every element of which is written: zeros for experts without a token.
    """
    check_pairs(x, ids, weights, table)
    (T, H), K, layout = x.shape, ids.shape[1], table.layout
    ids, weights, dy = ids.contiguous(), weights.contiguous(), dy.to(x.dtype).contiguous()
    x = x.contiguous()
    config = config or choose(x, ids, table, "grouped")
    dx, dweights = torch.empty_like(x), torch.empty_like(weights)
    d_gate_up, d_down, *biases = (
        None if frozen or p is None else torch.empty_like(p)
        for p in (gate_up, down, gate_up_bias, down_bias)
    )
    if ids.numel() == 0:
        for g in (dx, d_gate_up, d_down, *biases):
            if g is not None:
                g.zero_()
        return dx, dweights, d_gate_up, d_down, biases[0], biases[1]
    plan, pre = saved or save_hidden(x, ids, table, config)
    fast = config.path == "descriptors"
    d_pre, wa = torch.empty_like(pre), pre.new_empty(T * K, layout.intermediate)
    tile = config.hidden or _hidden_tile(config.gate_up)
    dots = torch.empty(
        T * K, triton.cdiv(layout.intermediate, tile.block_n), dtype=torch.float32, device=x.device
    )
    hidden = hidden_grad_tma if fast else _hidden_grad
    hidden(dy, weights, table, plan, pre, tile, d_pre, wa, dots)
    _weight_grad(dots, dy, ids, table, dweights)

    out = x.new_empty(T * K, H)
    if fast:
        rows_tma(d_pre, None, plan, table.slots.gate_up, config.down, out, turned=True)
    else:
        grouped_rows(d_pre, None, plan, _stored_rows_args(table), config.down, out)
    sum_pairs(out, ids, table.address, dx)

    if d_gate_up is None or d_down is None:
        return dx, dweights, None, None, None, None
    turned = layout.transposed
    outer = outer_tma if fast else grouped_outer
    outer(d_pre, x, plan, "b", d_gate_up.mT if turned else d_gate_up, config.outer)
    outer(dy, wa, plan, "a", d_down.mT if turned else d_down, config.outer)
    if biases[0] is not None:
        grouped_bias_grad(d_pre, None, plan, biases[0])
    if biases[1] is not None:
        grouped_bias_grad(dy, weights, plan, biases[1])
    return dx, dweights, d_gate_up, d_down, biases[0], biases[1]


def _hidden_tile(tile: Tile) -> Tile:
    """Two results and three inputs of the epilogue beside the accumulator: wider tiles spill."""
    return replace(tile, block_n=min(tile.block_n, 64))


def _hidden_grad(
    dy: Tensor,
    weights: Tensor,
    table: Any,
    plan: Plan,
    pre: Tensor,
    tile: Tile,
    d_pre: Tensor,
    wa: Tensor,
    dots: Tensor,
) -> None:
    """Fills d_pre [P, 2I], w * a [P, I] by sorted row and dots [P, blocks of I] by pair."""
    layout, H = table.layout, dy.shape[1]
    blocks_n = dots.shape[1]
    _hidden_grad_kernel[(plan.tiles * blocks_n,)](
        dy,
        weights,
        pre,
        d_pre,
        wa,
        dots,
        alpha=layout.alpha,
        limit=layout.limit,
        K=plan.top_k,
        H=H,
        inter=layout.intermediate,
        blocks_n=blocks_n,
        ACTIVATION=layout.activation,
        INTERLEAVED=layout.interleaved,
        EVEN_K=H % tile.block_k == 0,
        **plan_args(plan),
        **down_args(table),
        **(tile.launch() | {"BLOCK_M": plan.block_m}),
    )


def _weight_grad(dots: Tensor, dy: Tensor, ids: Tensor, table: Any, dweights: Tensor) -> None:
    """Fills dweights [T, k]."""
    block_p = 16
    _weight_grad_kernel[(triton.cdiv(ids.numel(), block_p),)](
        dots,
        dy,
        ids,
        dweights,
        num_pairs=ids.numel(),
        K=ids.shape[1],
        E=table.layout.num_experts,
        H=dy.shape[1],
        blocks=dots.shape[1],
        BLOCKS=triton.next_power_of_2(dots.shape[1]),
        BLOCK_P=block_p,
        BLOCK_H=128,
        num_warps=4,
        **down_args(table),
    )
