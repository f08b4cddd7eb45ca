"""What the kernels share: the dot, the activations, and the two matmul tiles over an expert.

Only this file knows how `spac.layout.ExpertTable` becomes kernel arguments (`table_args`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spac.kernels.dequant import quantized_tile
from spac.kernels.dot import dot


@triton.jit
def activate(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    """act(gate) * up in fp32, as `spac.reference.activate`; NaN goes through, as on the CPU."""
    if ACTIVATION == "swiglu_clamp":
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        return (up + 1) * gate * tl.sigmoid(alpha * gate)
    elif ACTIVATION == "silu":
        return gate * tl.sigmoid(gate) * up
    elif ACTIVATION == "relu":
        return tl.maximum(gate, 0.0, propagate_nan=tl.PropagateNan.ALL) * up
    elif ACTIVATION == "gelu":
        return 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476)) * up
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)  # sqrt(2 / pi)
        return gate * tl.sigmoid(2 * inner) * up  # (1 + tanh(z)) / 2 = sigmoid(2 z)


@triton.jit
def activate_backward(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    """Derivatives of `activate` by gate and by up, as `spac.reference.activate_backward`."""
    if ACTIVATION == "swiglu_clamp":
        g = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        u = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        s = tl.sigmoid(alpha * g)
        d_gate = (u + 1) * s * (1 + alpha * g * (1 - s))
        d_gate = tl.where(gate > limit, 0.0, d_gate)
        return d_gate, tl.where(tl.abs(up) > limit, 0.0, g * s)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(gate)
        return s * (1 + gate * (1 - s)) * up, gate * s
    elif ACTIVATION == "relu":
        return tl.where(gate > 0, up, 0.0), tl.maximum(gate, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
        slope = cdf + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327  # 1 / sqrt(2 pi)
        return slope * up, gate * cdf
    else:
        s = tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        inner = 0.7978845608028654 * (1 + 0.134145 * gate * gate)
        return (s + 2 * gate * s * (1 - s) * inner) * up, gate * s


@triton.jit
def weight_pointer(address, like_ptr, ALIGN: tl.constexpr):
    """The int64 `address`, a multiple of ALIGN bytes, as a pointer to elements as in `like_ptr`."""
    return tl.multiple_of(address.to(tl.pointer_type(like_ptr.dtype.element_ty)), ALIGN)


@triton.jit
def matmul_tile(
    a_ptr,
    rows,
    stride_am,
    mask_m,
    w_ptr,
    offs_w,
    mask_n,
    stride_wk,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    copy_ptr=None,
    copying=False,
    COPY: tl.constexpr = False,
    scale_offset=0,
    offs_row=0,
    GROUP: tl.constexpr = 0,
):
    """fp32 [BLOCK_M, BLOCK_N] = a[rows] @ w.T over K; `offs_w` [BLOCK_N]: where w's rows begin.

    With COPY and if `copying`, what is read of w is stored behind `copy_ptr` as well. GROUP other
    than 0: w is quantised, and `offs_row` are the numbers of its rows; see `quantized_tile`.
    """
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + rows[:, None] * stride_am + offs_k[None, :]
    if GROUP != 0:
        return quantized_tile(
            a_ptrs, mask_m, w_ptr, offs_w, mask_n, scale_offset, offs_row, K,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP, copy_ptr, copying, COPY,
        )  # fmt: skip
    w_ptrs = w_ptr + offs_w[None, :] + offs_k[:, None] * stride_wk
    if COPY:
        copy_ptrs = copy_ptr + offs_w[None, :] + offs_k[:, None] * stride_wk
        copy_end = tl.where(copying, K, 0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs, mask=mask_m[:, None], other=0.0)
            w = tl.load(w_ptrs, mask=mask_n[None, :], other=0.0)
        else:
            mask_k = offs_k < K - k0
            a = tl.load(a_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = dot(a, w, acc)
        if COPY:
            tl.store(copy_ptrs, w, mask=mask_n[None, :] & (offs_k < copy_end - k0)[:, None])
            copy_ptrs += BLOCK_K * stride_wk
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk
    return acc


@triton.jit
def split_gate_up(both, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INTERLEAVED: tl.constexpr):
    """gate and up [BLOCK_M, BLOCK_N] of a product whose columns are rows of both."""
    if INTERLEAVED:
        return tl.split(tl.reshape(both, (BLOCK_M, BLOCK_N, 2)))
    else:
        return tl.split(tl.permute(tl.reshape(both, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))


@triton.jit
def store_hidden(
    gate,
    up,
    rows,
    offs_n,
    mask,
    h_ptr,
    pre_ptr,
    alpha,
    limit,
    inter,
    ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SAVE: tl.constexpr,
):
    """h = act(gate) * up of sorted rows and, with SAVE, gate and up in their stored order."""
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
def store_hidden_grad(
    g,
    rows,
    offs_n,
    mask_m,
    weight,
    pre_ptr,
    d_pre_ptr,
    wa_ptr,
    alpha,
    limit,
    inter,
    ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Stores d_pre and w * a of sorted rows for the columns offs_n; returns their sums of a * g."""
    mask = mask_m[:, None] & (offs_n < inter)[None, :]
    columns = rows[:, None] * (2 * inter) + (offs_n * (2 if INTERLEAVED else 1))[None, :]
    up_columns = columns + (1 if INTERLEAVED else inter)
    gate = tl.load(pre_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(pre_ptr + up_columns, mask=mask, other=0.0).to(tl.float32)
    a = activate(gate, up, alpha, limit, ACTIVATION)
    dtype = d_pre_ptr.dtype.element_ty
    tl.store(wa_ptr + rows[:, None] * inter + offs_n[None, :], (weight * a).to(dtype), mask=mask)
    d_gate, d_up = activate_backward(gate, up, alpha, limit, ACTIVATION)
    tl.store(d_pre_ptr + columns, (weight * g * d_gate).to(dtype), mask=mask)
    tl.store(d_pre_ptr + up_columns, (weight * g * d_up).to(dtype), mask=mask)
    return tl.sum(a * g, axis=1)


@triton.jit
def gate_up_tile(
    x_ptr,
    rows,
    stride_xm,
    mask_m,
    w_ptr,
    bias_ptr,
    gate_stride,
    gate_k_stride,
    up_offset,
    bias_stride,
    bias_up_offset,
    n0,
    H,
    inter,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BIAS: tl.constexpr,
    copy_ptr=None,
    bias_copy_ptr=None,
    copying=False,
    COPY: tl.constexpr = False,
    scale_offset=0,
    GROUP: tl.constexpr = 0,
):
    """gate and up, fp32 [BLOCK_M, BLOCK_N] each, of x[rows] for intermediate units n0...

    One product of 2 * BLOCK_N columns. Interleaved rows stay in stored order, so that a transposed
    interleaved layout (GPT-OSS) reads whole lines; else the gate rows come first.
    """
    column = tl.arange(0, 2 * BLOCK_N)
    if INTERLEAVED:
        row = 2 * n0 + column
        offs_w = row.to(tl.int64) * up_offset
        mask_w = 2 * n0 + column < 2 * inter
    else:
        is_up = column >= BLOCK_N
        unit = n0 + tl.where(is_up, column - BLOCK_N, column)
        offs_w = unit.to(tl.int64) * gate_stride + tl.where(is_up, up_offset, 0)
        row = tl.where(is_up, unit + inter, unit)
        mask_w = unit < inter
    both = matmul_tile(
        x_ptr,
        rows,
        stride_xm,
        mask_m,
        w_ptr,
        offs_w,
        mask_w,
        gate_k_stride,
        H,
        BLOCK_M,
        2 * BLOCK_N,
        BLOCK_K,
        EVEN_K,
        copy_ptr,
        copying,
        COPY,
        scale_offset,
        row,
        GROUP,
    )
    gate, up = split_gate_up(both, BLOCK_M, BLOCK_N, INTERLEAVED)
    if BIAS:
        offs_n = n0 + tl.arange(0, BLOCK_N)
        offs_b = offs_n * bias_stride
        mask_n = offs_n < inter
        gate_bias = tl.load(bias_ptr + offs_b, mask=mask_n, other=0.0)
        up_bias = tl.load(bias_ptr + offs_b + bias_up_offset, mask=mask_n, other=0.0)
        gate += gate_bias.to(tl.float32)[None, :]
        up += up_bias.to(tl.float32)[None, :]
        if COPY:
            mask_copy = offs_n < tl.where(copying, inter, 0)
            tl.store(bias_copy_ptr + offs_b, gate_bias, mask=mask_copy)
            tl.store(bias_copy_ptr + offs_b + bias_up_offset, up_bias, mask=mask_copy)
    return gate, up


def gate_up_args(table: Any) -> dict[str, Any]:
    """Keyword arguments of every kernel that reads gate and up rows through an ExpertTable."""
    return {
        "address_ptr": table.address,
        "gate_stride": table.gate_stride,
        "gate_k_stride": table.gate_k_stride,
        "up_offset": table.up_offset,
        "bias_offset": table.gate_up_bias_offset,
        "bias_skew": table.gate_up_bias_skew,
        "bias_stride": table.bias_stride,
        "bias_up_offset": table.bias_up_offset,
        "alpha": table.layout.alpha,
        "limit": table.layout.limit,
        "ACTIVATION": table.layout.activation,
        "INTERLEAVED": table.layout.interleaved,
        "BIAS": table.layout.bias,
        "ALIGN": table.align,
    }


def down_args(table: Any) -> dict[str, Any]:
    """Keyword arguments of every kernel that reads down rows through an ExpertTable."""
    return {
        "address_ptr": table.address,
        "w_offset": table.down_offset,
        "w_skew": table.down_skew,
        "stride_wn": table.down_stride,
        "stride_wk": table.down_k_stride,
        "bias_offset": table.down_bias_offset,
        "bias_skew": table.down_bias_skew,
        "BIAS": table.layout.bias,
        "ALIGN": math.gcd(table.align, table.down_offset, table.down_skew),
    }


def copy_args(table: Any) -> dict[str, Any]:
    """Keyword arguments of the kernels that can store the weights that they read elsewhere."""
    copy = table.copy_to is not None
    return {"copy_to_ptr": table.copy_to if copy else table.address, "COPY": copy}


def check_pairs(x: Tensor, ids: Tensor, weights: Tensor, table: Any) -> None:
    """Raise ValueError unless the arguments of an expert FFN fit each other and the table."""
    layout = table.layout
    if x.dim() != 2 or x.shape[1] != layout.hidden or x.dtype != layout.dtype:
        raise ValueError(
            f"x: expected [T, {layout.hidden}] in {layout.dtype}, got {list(x.shape)} in {x.dtype}"
        )
    if ids.dim() != 2 or ids.shape[0] != x.shape[0] or ids.shape != weights.shape:
        raise ValueError(
            f"ids and weights: expected [{x.shape[0]}, k], "
            f"got {list(ids.shape)} and {list(weights.shape)}"
        )
    if table.address.dtype != torch.int64 or table.address.numel() != layout.num_experts:
        raise ValueError(
            f"table.address: expected int64 [{layout.num_experts}], "
            f"got {table.address.dtype} {list(table.address.shape)}"
        )
    if table.copy_to is not None and (
        table.copy_to.dtype != torch.int64 or table.copy_to.numel() != layout.num_experts
    ):
        raise ValueError(
            f"table.copy_to: expected int64 [{layout.num_experts}], "
            f"got {table.copy_to.dtype} {list(table.copy_to.shape)}"
        )
    if layout.interleaved and table.gate_stride != 2 * table.up_offset:
        raise ValueError(
            f"table: interleaved rows need gate_stride = 2 * up_offset, "
            f"got {table.gate_stride} and {table.up_offset}"
        )
