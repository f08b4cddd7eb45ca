"""The expert FFN over the address table, for any number of tokens.

"tokens" (at most 16 tokens): two launches; every program finds its expert by itself.
"grouped" (any number): `kernels/grouped.py`, on pairs sorted by expert.
No atomics: the same inputs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spac.kernels.common import (
    activate,
    check_pairs,
    dot,
    down_args,
    gate_up_args,
    gate_up_tile,
    weight_pointer,
)
from spac.kernels.config import FFNConfig, device_of, select_config
from spac.kernels.grouped import Plan, grouped_down, grouped_gate_up, make_plan
from spac.kernels.sum_pairs import sum_pairs


@triton.jit
def _distinct_kernel_part(
    ids_ptr, address_ptr, list_ptr, num_pairs, E, EXPERTS: tl.constexpr, CHUNK: tl.constexpr
):
    """list = number of distinct experts of the window that are here, their ids, and a 0."""
    offs_e = tl.arange(0, EXPERTS)
    used = tl.zeros((EXPERTS,), tl.int32)
    for p0 in range(0, num_pairs, CHUNK):
        offs_p = p0 + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + offs_p, mask=offs_p < num_pairs, other=-1)
        hit = (ids[None, :] == offs_e[:, None]).to(tl.int32)
        used = tl.maximum(used, tl.max(hit, axis=1))
    address = tl.load(address_ptr + offs_e, mask=offs_e < E, other=0)
    used = tl.where(address != 0, used, 0)
    rank = tl.cumsum(used, axis=0) - used
    tl.store(list_ptr + 1 + rank, offs_e, mask=used != 0)
    count = tl.sum(used, axis=0)
    tl.store(list_ptr, count)
    tl.store(list_ptr + 1 + count, 0)


@triton.jit(do_not_specialize=["T"])
def _gate_up_tokens_kernel(
    x_ptr,
    stride_xt,
    ids_ptr,
    h_ptr,
    list_ptr,
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
    T,
    K,
    E,
    H,
    inter,
    ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BIAS: tl.constexpr,
    ALIGN: tl.constexpr,
    BY_PAIR: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h[e, t] = act(gate_e x_t) * up_e x_t for the tokens t that chose e.

    Grid (pairs or experts, blocks of I). By pair, the first pair of an expert does its work.
    """
    slot = tl.program_id(0)
    pid_n = tl.program_id(1)
    offs_t = tl.arange(0, BLOCK_M)
    offs_j = tl.arange(0, CHOICES)
    pair = offs_t[:, None] * K + offs_j[None, :]
    mask = (offs_t[:, None] < T) & (offs_j[None, :] < K)
    ids = tl.load(ids_ptr + pair, mask=mask, other=-1)
    if BY_PAIR:
        e = tl.load(ids_ptr + slot).to(tl.int32)
    else:
        e = slot
    if (slot == 0) & (pid_n == 0):
        _distinct_kernel_part(ids_ptr, address_ptr, list_ptr, T * K, E, EXPERTS, 16)
    if (e < 0) | (e >= E):
        return
    address = tl.load(address_ptr + e)
    hit = ids == e
    first = tl.min(tl.min(tl.where(hit, pair, BLOCK_M * K), axis=1), axis=0)
    here = (first == slot) if BY_PAIR else (first < BLOCK_M * K)
    if (address == 0) | (here == 0):
        return
    mask_t = tl.max(hit.to(tl.int32), axis=1) != 0
    n0 = pid_n * BLOCK_N
    gate, up = gate_up_tile(
        x_ptr,
        offs_t,
        stride_xt,
        mask_t,
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
    h = activate(gate, up, alpha, limit, ACTIVATION)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    rows = e.to(tl.int64) * T + offs_t
    h_ptrs = h_ptr + rows[:, None] * inter + offs_n[None, :]
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=mask_t[:, None] & (offs_n[None, :] < inter))


@triton.jit(do_not_specialize=["T"])
def _down_tokens_kernel(
    h_ptr,
    ids_ptr,
    weights_ptr,
    list_ptr,
    y_ptr,
    address_ptr,
    w_offset,
    w_skew,
    stride_wn,
    stride_wk,
    bias_offset,
    bias_skew,
    T,
    K,
    H,
    inter,
    BIAS: tl.constexpr,
    ALIGN: tl.constexpr,
    CHOICES: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[t] = sum over the listed experts e of weight[t, e] * (down_e h[e, t] + bias_e).

    Grid (blocks of H,). One flat loop over (expert, step of I), so that the pipeline never
    drains; the experts come in ascending order, which fixes the order of the sum.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < H
    offs_k = tl.arange(0, BLOCK_K)
    offs_t = tl.arange(0, BLOCK_M)
    offs_j = tl.arange(0, CHOICES)
    pair = offs_t[:, None] * K + offs_j[None, :]
    mask = (offs_t[:, None] < T) & (offs_j[None, :] < K)
    ids = tl.load(ids_ptr + pair, mask=mask, other=-1).to(tl.int32)
    weights = tl.load(weights_ptr + pair, mask=mask, other=0.0).to(tl.float32)
    steps = tl.load(list_ptr) * tl.cdiv(inter, BLOCK_K)
    w_offs = offs_n[None, :].to(tl.int64) * stride_wn + offs_k[:, None] * stride_wk
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # The next expert is loaded one step early: an address that is loaded in the step that uses
    # it would make Triton split the pipeline's stages between the two loads. An `if` in the loop
    # would end the pipelining altogether.
    i = 0
    k0 = 0
    e = tl.load(list_ptr + 1)
    address = tl.load(address_ptr + e)
    for _ in range(0, steps):
        wide = e.to(tl.int64)
        w_t = tl.sum(tl.where(ids == e, weights, 0.0), axis=1)
        mask_t = w_t != 0.0
        w_ptr = weight_pointer(address + w_offset + wide * w_skew, h_ptr, ALIGN)
        w_ptrs = w_ptr + k0 * stride_wk + w_offs
        h_ptrs = h_ptr + ((wide * T + offs_t) * inter)[:, None] + (k0 + offs_k)[None, :]
        if EVEN_K:
            h = tl.load(h_ptrs, mask=mask_t[:, None], other=0.0)
            w = tl.load(w_ptrs, mask=mask_n[None, :], other=0.0)
        else:
            mask_k = offs_k < inter - k0
            h = tl.load(h_ptrs, mask=mask_t[:, None] & mask_k[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        part = dot(h, w, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        if BIAS:
            bias_ptr = weight_pointer(address + bias_offset + wide * bias_skew, h_ptr, 1)
            bias = tl.load(bias_ptr + offs_n, mask=offs_n < tl.where(k0 == 0, H, 0), other=0.0)
            part += bias.to(tl.float32)[None, :]
        acc += w_t[:, None] * part
        k0 += BLOCK_K
        done = k0 >= inter
        i += done.to(tl.int32)
        k0 = tl.where(done, 0, k0)
        e = tl.load(list_ptr + 1 + i)
        address = tl.load(address_ptr + e)
    y_ptrs = y_ptr + offs_t[:, None] * H + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(offs_t[:, None] < T) & mask_n[None, :])


def expert_ffn(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    table: Any,
    out_dtype: torch.dtype | None = None,
    config: FFNConfig | None = None,
) -> Tensor:
    """y[t] = sum_j weights[t, j] * ffn(ids[t, j], x[t]) over the experts in `table`.

    x [T, H] in the layout's dtype, ids [T, k] int32 or int64, weights [T, k] float. Returns
    [T, H] in `out_dtype` (default x.dtype). Ids outside 0..E-1 and experts at address 0 add
    nothing and read nothing. `config` overrides `select_config`.
    """
    check_pairs(x, ids, weights, table)
    (T, H), K, layout = x.shape, ids.shape[1], table.layout
    y = torch.empty(T, H, dtype=out_dtype or x.dtype, device=x.device)
    if T == 0:
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    ids, weights = ids.contiguous(), weights.contiguous()
    config = config or select_config(T, K, layout, device_of(x.device))
    if config.path == "tokens":
        _tokens(x, ids, weights, table, y, config)
    else:
        _grouped(x, ids, weights, table, y, config)
    return y


def _grouped(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    table: Any,
    y: Tensor,
    config: FFNConfig,
    pre: Tensor | None = None,
) -> Plan:
    plan = make_plan(ids, table, config.gate_up.block_m)
    h = x.new_empty(ids.numel(), table.layout.intermediate)
    grouped_gate_up(x, plan, table, config.gate_up, h, pre)
    # fp32 partial results as long as they stay in L2; beyond, traffic counts more.
    small = ids.numel() * x.shape[1] <= 2**22
    out = torch.empty(
        ids.numel(), x.shape[1], dtype=torch.float32 if small else x.dtype, device=x.device
    )
    grouped_down(h, weights, plan, table, config.down, out)
    sum_pairs(out, ids, table.address, y)
    return plan


def save_hidden(x: Tensor, ids: Tensor, table: Any, config: FFNConfig) -> tuple[Plan, Tensor]:
    """What a backward pass needs of the forward: the plan, and gate and up [P, 2I] by row."""
    plan = make_plan(ids.contiguous(), table, config.gate_up.block_m)
    h = x.new_empty(ids.numel(), table.layout.intermediate)
    pre = x.new_empty(ids.numel(), 2 * table.layout.intermediate)
    grouped_gate_up(x, plan, table, config.gate_up, h, pre)
    return plan, pre


def expert_ffn_train(
    x: Tensor, ids: Tensor, weights: Tensor, table: Any, config: FFNConfig | None = None
) -> tuple[Tensor, tuple[Plan, Tensor]]:
    """y [T, H] in x.dtype as from `expert_ffn`, and what `expert_ffn_backward` saves by having."""
    check_pairs(x, ids, weights, table)
    (T, H), K = x.shape, ids.shape[1]
    config = config or select_config(T, K, table.layout, device_of(x.device), "grouped")
    ids, weights = ids.contiguous(), weights.contiguous()
    y = torch.empty(T, H, dtype=x.dtype, device=x.device)
    pre = x.new_empty(T * K, 2 * table.layout.intermediate)
    plan = _grouped(x.contiguous(), ids, weights, table, y, config, pre)
    return y, (plan, pre)


def _tokens(
    x: Tensor, ids: Tensor, weights: Tensor, table: Any, y: Tensor, config: FFNConfig
) -> None:
    (T, H), K, layout = x.shape, ids.shape[1], table.layout
    E, inter = layout.num_experts, layout.intermediate
    gate_up, down = config.gate_up, config.down
    h = x.new_empty(E, T, inter)
    experts = torch.empty(E + 2, dtype=torch.int32, device=x.device)
    by_pair = T * K < E
    _gate_up_tokens_kernel[(T * K if by_pair else E, triton.cdiv(inter, gate_up.block_n))](
        x,
        x.stride(0),
        ids,
        h,
        experts,
        T=T,
        K=K,
        E=E,
        H=H,
        inter=inter,
        BY_PAIR=by_pair,
        EXPERTS=triton.next_power_of_2(E),
        CHOICES=triton.next_power_of_2(K),
        EVEN_K=H % gate_up.block_k == 0,
        **gate_up_args(table),
        **gate_up.launch(),
    )
    _down_tokens_kernel[(triton.cdiv(H, down.block_n),)](
        h,
        ids,
        weights,
        experts,
        y,
        T=T,
        K=K,
        H=H,
        inter=inter,
        CHOICES=triton.next_power_of_2(K),
        EVEN_K=inter % down.block_k == 0,
        **down_args(table),
        **down.launch(),
    )
