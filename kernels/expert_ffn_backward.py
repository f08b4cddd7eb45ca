"""Gradients of the expert FFN, on pairs sorted by expert (`kernels/grouped.py`). Deterministic.

With r a sorted row, t its token and w its routing weight, and g[r] = dy[t] @ down_e:
    d_pre[r]     = w g[r] * d activate(pre[r])        d_weight[r] = <h[r], g[r]> + <bias_e, dy[t]>
    dx[t]        = sum of d_pre[r] @ gate_up_e        d_gate_up_e = sum of d_pre[r]^T x[t]
    d_down_e     = sum of (w dy[t])^T h[r]
pre and h are computed again rather than kept from the forward.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spac.kernels.common import (
    activate_backward,
    check_pairs,
    dot,
    down_args,
    gate_up_args,
    matmul_tile,
    weight_pointer,
)
from spac.kernels.config import FFNConfig, Tile, device_of, select_config
from spac.kernels.grouped import (
    Plan,
    grouped_gate_up,
    grouped_rows,
    make_plan,
    plan_args,
    tile_rows,
)
from spac.kernels.sum_pairs import sum_pairs


@triton.jit
def _d_pre_kernel(
    dy_ptr,
    stride_dt,
    pre_ptr,
    h_ptr,
    weights_ptr,
    d_pre_ptr,
    d_weight_ptr,
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
    """d_pre by sorted row, and the share of d_weight that this block of I has, by pair.

    Grid (tiles * blocks of inter,).
    """
    pid = tl.program_id(0)
    tile = pid // blocks_n
    block = pid - tile * blocks_n
    n0 = block * BLOCK_N
    e, rows, pairs, mask_m = tile_rows(
        order_ptr, offsets_ptr, tile_expert_ptr, tile_row_ptr, tile, BLOCK_M
    )
    if e < 0:
        return
    address = tl.load(address_ptr + e)
    wide = e.to(tl.int64)
    tokens = pairs // K
    g = matmul_tile(
        dy_ptr,
        tokens,
        stride_dt,
        mask_m,
        weight_pointer(address + w_offset + wide * w_skew, dy_ptr, ALIGN),
        stride_wk,  # down_e read the other way round: n runs over I, the depth over H
        stride_wn,
        n0,
        inter,
        H,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EVEN_K,
    )
    offs_n = n0 + tl.arange(0, BLOCK_N)
    mask = mask_m[:, None] & (offs_n < inter)[None, :]
    columns = rows[:, None] * (2 * inter) + (offs_n * (2 if INTERLEAVED else 1))[None, :]
    up_column = 1 if INTERLEAVED else inter
    gate = tl.load(pre_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(pre_ptr + columns + up_column, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + rows[:, None] * inter + offs_n[None, :], mask=mask, other=0.0)
    d_weight = tl.sum(h.to(tl.float32) * g, axis=1)
    if BIAS:
        if n0 == 0:
            bias_ptr = weight_pointer(address + bias_offset + wide * bias_skew, dy_ptr, 1)
            for h0 in range(0, H, BLOCK_K):
                offs_h = h0 + tl.arange(0, BLOCK_K)
                mask_h = offs_h < H
                bias = tl.load(bias_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
                dy_ptrs = dy_ptr + tokens[:, None] * stride_dt + offs_h[None, :]
                dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_h[None, :], other=0.0)
                d_weight += tl.sum(dy.to(tl.float32) * bias[None, :], axis=1)
    tl.store(d_weight_ptr + pairs * blocks_n + block, d_weight, mask=mask_m)
    weight = tl.load(weights_ptr + pairs, mask=mask_m, other=0.0).to(tl.float32)
    slope_gate, slope_up = activate_backward(gate, up, alpha, limit, ACTIVATION)
    g = weight[:, None] * g
    out_type = d_pre_ptr.dtype.element_ty
    tl.store(d_pre_ptr + columns, (g * slope_gate).to(out_type), mask=mask)
    tl.store(d_pre_ptr + columns + up_column, (g * slope_up).to(out_type), mask=mask)


@triton.jit
def _outer_kernel(
    a_ptr,
    stride_ar,
    b_ptr,
    stride_br,
    weights_ptr,
    out_ptr,
    stride_oe,
    stride_on,
    stride_ok,
    bias_ptr,
    order_ptr,
    offsets_ptr,
    K,
    N,
    depth,
    blocks_k,
    A_BY_TOKEN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out_e [N, depth] = sum over the rows r of e of (w) a[r]^T b[r]; bias_e [N] = sum of (w) a[r].

    One of a and b is read by token, the other by sorted row. Grid (E, blocks of N * blocks of
    depth); experts without rows get zeros.
    """
    e = tl.program_id(0)
    pid = tl.program_id(1)
    n0 = (pid // blocks_k) * BLOCK_N
    k0 = (pid % blocks_k) * BLOCK_K
    offs_n, offs_k = n0 + tl.arange(0, BLOCK_N), k0 + tl.arange(0, BLOCK_K)
    mask_n, mask_k = offs_n < N, offs_k < depth
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    end = tl.load(offsets_ptr + e + 1)
    for m0 in range(tl.load(offsets_ptr + e), end, BLOCK_M):
        rows = m0 + tl.arange(0, BLOCK_M)
        mask_m = rows < end
        pairs = tl.load(order_ptr + rows, mask=mask_m, other=0)
        tokens = (pairs // K).to(tl.int64)
        a_rows = tokens if A_BY_TOKEN else rows.to(tl.int64)
        b_rows = rows.to(tl.int64) if A_BY_TOKEN else tokens
        a_ptrs = a_ptr + a_rows[:, None] * stride_ar + offs_n[None, :]
        b_ptrs = b_ptr + b_rows[:, None] * stride_br + offs_k[None, :]
        a = tl.load(a_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        if WEIGHTED:
            weight = tl.load(weights_ptr + pairs, mask=mask_m, other=0.0).to(tl.float32)
            a = (a.to(tl.float32) * weight[:, None]).to(b.dtype)
        if BIAS:
            total += tl.sum(a.to(tl.float32), axis=0)
        acc = dot(tl.trans(a), b, acc)
    out_ptrs = out_ptr + e.to(tl.int64) * stride_oe
    out_ptrs = out_ptrs + offs_n[:, None] * stride_on + offs_k[None, :] * stride_ok
    out_type = out_ptr.dtype.element_ty
    tl.store(out_ptrs, acc.to(out_type), mask=mask_n[:, None] & mask_k[None, :])
    if BIAS:
        if k0 == 0:
            tl.store(bias_ptr + e.to(tl.int64) * N + offs_n, total.to(out_type), mask=mask_n)


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
    config: FFNConfig | None = None,
) -> list[Tensor]:
    """Gradients of x, weights, gate_up, down and the biases, if any, for dy [T, H].

    Arguments as for `expert_ffn`, with the parameters behind `table`; each gradient has the shape
    and dtype of its tensor, and is written in full (zeros for experts that no token chose).
    """
    check_pairs(x, ids, weights, table)
    (T, H), k, layout = x.shape, ids.shape[1], table.layout
    inter = layout.intermediate
    parameters = [p for p in (gate_up, down, gate_up_bias, down_bias) if p is not None]
    if T == 0:
        return [torch.zeros_like(t) for t in (x, weights, *parameters)]
    dy, x, ids, weights = (t.contiguous() for t in (dy.to(x.dtype), x, ids, weights))
    config = config or select_config(T, k, layout, device_of(x.device), path="grouped")
    plan = make_plan(ids, table, config.gate_up.block_m)
    pre, h = x.new_empty(T * k, 2 * inter), x.new_empty(T * k, inter)
    grouped_gate_up(x, plan, table, config.gate_up, h, pre)
    d_pre, d_weights = _d_pre(dy, pre, h, weights, plan, table, config.gate_up)

    rows = x.new_empty(T * k, H)
    grouped_rows(d_pre, None, plan, _gate_up_rows(table), config.down, rows)
    dx = torch.empty_like(x)
    sum_pairs(rows, ids, table.address, dx)

    grads = [torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in parameters]
    tile = config.gate_up
    bias_grads: list[Tensor | None] = [*grads[2:]] if layout.bias else [None, None]
    axes = (2, 1) if layout.transposed else (1, 2)
    _outer(d_pre, x, None, plan, grads[0], axes, bias_grads[0], tile)
    _outer(dy, h, weights, plan, grads[1], axes, bias_grads[1], tile)
    return [dx, d_weights.to(weights.dtype), *grads]


def _gate_up_rows(table: Any) -> dict[str, Any]:
    """gate_up_e as [N = H, depth = 2I], in stored row order, for `grouped_rows`."""
    row = table.up_offset if table.layout.interleaved else table.gate_stride
    return down_args(table) | {
        "w_offset": 0,
        "w_skew": 0,
        "stride_wn": table.gate_k_stride,
        "stride_wk": row,
        "BIAS": False,
        "ALIGN": table.align,
    }


def _d_pre(
    dy: Tensor, pre: Tensor, h: Tensor, weights: Tensor, plan: Plan, table: Any, tile: Tile
) -> tuple[Tensor, Tensor]:
    H, inter = dy.shape[1], h.shape[1]
    blocks_n = triton.cdiv(inter, tile.block_n)
    d_pre = torch.empty_like(pre)
    shares = torch.zeros(*weights.shape, blocks_n, dtype=torch.float32, device=dy.device)
    activation = {
        k: gate_up_args(table)[k] for k in ("alpha", "limit", "ACTIVATION", "INTERLEAVED")
    }
    _d_pre_kernel[(plan.tiles * blocks_n,)](
        dy,
        dy.stride(0),
        pre,
        h,
        weights,
        d_pre,
        shares,
        K=plan.top_k,
        H=H,
        inter=inter,
        blocks_n=blocks_n,
        EVEN_K=H % tile.block_k == 0,
        **plan_args(plan),
        **down_args(table),
        **activation,
        **tile.launch() | {"BLOCK_M": plan.block_m},
    )
    return d_pre, shares.sum(dim=-1)


def _outer(
    a: Tensor,
    b: Tensor,
    weights: Tensor | None,
    plan: Plan,
    out: Tensor,
    axes: tuple[int, int],
    bias: Tensor | None,
    tile: Tile,
) -> None:
    """Fills out [E, ...] and bias [E, N]; with `weights`, a is read by token and scaled."""
    N, depth = a.shape[1], b.shape[1]
    block = min(64, tile.block_n)
    blocks_k = triton.cdiv(depth, block)
    _outer_kernel[(out.shape[0], triton.cdiv(N, block) * blocks_k)](
        a,
        a.stride(0),
        b,
        b.stride(0),
        a if weights is None else weights,
        out,
        out.stride(0),
        out.stride(axes[0]),
        out.stride(axes[1]),
        out if bias is None else bias,
        plan.order,
        plan.offsets,
        K=plan.top_k,
        N=N,
        depth=depth,
        blocks_k=blocks_k,
        A_BY_TOKEN=weights is not None,
        WEIGHTED=weights is not None,
        BIAS=bias is not None,
        BLOCK_M=32,
        BLOCK_N=block,
        BLOCK_K=block,
        num_warps=4,
    )
