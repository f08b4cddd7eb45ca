"""The expert FFN of a few tokens: two launches, in which every program finds its expert by itself.

Rows of the matmul tiles are the tokens; rows of tokens that did not choose the expert are masked.
The result of a pair is kept until the last program of its columns has arrived, which adds the
pairs of each token in order: who adds changes from run to run, what is added and how does not.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spac.kernels.common import (
    activate,
    copy_args,
    down_args,
    gate_up_args,
    gate_up_tile,
    matmul_tile,
    weight_pointer,
)
from spac.kernels.config import FFNConfig
from spac.kernels.dequant import quantized_args
from spac.kernels.flag import LONGEST
from spac.kernels.pull import place_args, wait_for_place


@triton.jit
def _load_ids(ids_ptr, T, K, E, BLOCK_M: tl.constexpr, CHOICES: tl.constexpr):
    """ids [BLOCK_M, CHOICES], -1 for none and beyond T and K, and the number of each pair."""
    offs_t = tl.arange(0, BLOCK_M)
    offs_j = tl.arange(0, CHOICES)
    pair = offs_t[:, None] * K + offs_j[None, :]
    mask = (offs_t[:, None] < T) & (offs_j[None, :] < K)
    ids = tl.load(ids_ptr + pair, mask=mask, other=-1)
    return tl.where((ids >= 0) & (ids < E), ids, -1).to(tl.int32), pair


@triton.jit
def _my_expert(
    ids_ptr,
    ids,
    pair,
    address_ptr,
    E,
    BY_PAIR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHOICES: tl.constexpr,
):
    """Expert, its address (0: nothing to do here), and each token's row among the pairs or -1.

    By pair, the first pair of an expert does its work. A token that names an expert twice has its
    row at the later pair.
    """
    slot = tl.program_id(0)
    if BY_PAIR:
        e = tl.load(ids_ptr + slot)
    else:
        e = slot
    valid = (e >= 0) & (e < E)
    e = tl.where(valid, e, 0).to(tl.int32)
    hit = (ids == e) & valid
    first = tl.min(tl.min(tl.where(hit, pair, BLOCK_M * CHOICES), axis=1), axis=0)
    mine = (first == slot) if BY_PAIR else (first < BLOCK_M * CHOICES)
    address = tl.where(mine, tl.load(address_ptr + e), 0)
    return e, address, tl.max(tl.where(hit, pair, -1), axis=1)


@triton.jit(do_not_specialize=["T"])
def _gate_up_tokens_kernel(
    x_ptr,
    stride_xt,
    ids_ptr,
    h_ptr,
    arrived_ptr,
    columns,
    address_ptr,
    copy_to_ptr,
    place_ptr,
    flags_ptr,
    failed_ptr,
    longest,
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
    WAIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BIAS: tl.constexpr,
    ALIGN: tl.constexpr,
    COPY: tl.constexpr,
    BY_PAIR: tl.constexpr,
    CHOICES: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    scale_offset=0,
    GROUP: tl.constexpr = 0,
):
    """h[pair] = act(gate_e x_t) * up_e x_t. Grid (pairs or experts, blocks of I)."""
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        offs_c = tl.arange(0, COLUMNS)
        tl.store(arrived_ptr + offs_c, tl.zeros((COLUMNS,), tl.int32), mask=offs_c < columns)
    ids, pair = _load_ids(ids_ptr, T, K, E, BLOCK_M, CHOICES)
    e, address, row = _my_expert(ids_ptr, ids, pair, address_ptr, E, BY_PAIR, BLOCK_M, CHOICES)
    if address == 0:
        return
    if WAIT:  # the down product comes after this launch: it finds every expert there
        place = tl.load(place_ptr + e)
        if place >= 0:
            wait_for_place(flags_ptr, place, failed_ptr, longest)
    mask_t = row >= 0
    n0 = tl.program_id(1) * BLOCK_N
    bias_at = bias_offset + e.to(tl.int64) * bias_skew
    copy_to = tl.load(copy_to_ptr + e) if COPY else address
    gate, up = gate_up_tile(
        x_ptr,
        tl.arange(0, BLOCK_M),
        stride_xt,
        mask_t,
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
    h = activate(gate, up, alpha, limit, ACTIVATION)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    h_ptrs = h_ptr + row[:, None] * inter + offs_n[None, :]
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=mask_t[:, None] & (offs_n < inter)[None, :])


@triton.jit
def _sum_tokens(
    out_ptr,
    ids,
    address_ptr,
    K,
    H,
    offs_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHOICES: tl.constexpr,
):
    """Sum over j, in order, of out[t * K + j] for the pairs that were computed."""
    offs_j = tl.arange(0, CHOICES)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j in tl.static_range(CHOICES):
        e = tl.max(tl.where(offs_j[None, :] == j, ids, -1), axis=1)
        later = tl.max(((ids == e[:, None]) & (offs_j[None, :] > j)).to(tl.int32), axis=1)
        used = (e >= 0) & (later == 0)
        used = used & (tl.load(address_ptr + tl.where(used, e, 0)) != 0)
        rows = out_ptr + (tl.arange(0, BLOCK_M) * K + j)[:, None] * H
        mask = used[:, None] & (offs_n < H)[None, :]
        # Other programs wrote this: it must come from L2.
        total += tl.load(rows + offs_n[None, :], mask=mask, other=0.0, cache_modifier=".cg")
    return total


@triton.jit(do_not_specialize=["T"])
def _down_tokens_kernel(
    h_ptr,
    ids_ptr,
    weights_ptr,
    out_ptr,
    arrived_ptr,
    y_ptr,
    address_ptr,
    copy_to_ptr,
    w_offset,
    w_skew,
    stride_wn,
    stride_wk,
    bias_offset,
    bias_skew,
    T,
    K,
    E,
    H,
    inter,
    BIAS: tl.constexpr,
    ALIGN: tl.constexpr,
    COPY: tl.constexpr,
    BY_PAIR: tl.constexpr,
    CHOICES: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    scale_offset=0,
    GROUP: tl.constexpr = 0,
):
    """y[t] = sum of weight * (down_e h[pair] + bias_e). Grid (pairs or experts, blocks of H)."""
    pid_n = tl.program_id(1)
    n0 = pid_n * BLOCK_N
    offs_n = n0 + tl.arange(0, BLOCK_N)
    mask_n = offs_n < H
    ids, pair = _load_ids(ids_ptr, T, K, E, BLOCK_M, CHOICES)
    e, address, row = _my_expert(ids_ptr, ids, pair, address_ptr, E, BY_PAIR, BLOCK_M, CHOICES)
    if address != 0:
        mask_t = row >= 0
        w = tl.load(weights_ptr + pair, mask=ids == e, other=0.0).to(tl.float32)
        w_at = w_offset + e.to(tl.int64) * w_skew
        bias_at = bias_offset + e.to(tl.int64) * bias_skew
        copy_to = tl.load(copy_to_ptr + e) if COPY else address
        part = matmul_tile(
            h_ptr,
            row,
            inter,
            mask_t,
            weight_pointer(address + w_at, h_ptr, ALIGN),
            offs_n.to(tl.int64) * stride_wn,
            mask_n,
            stride_wk,
            inter,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            EVEN_K,
            weight_pointer(copy_to + w_at, h_ptr, ALIGN),
            copy_to != 0,
            COPY,
            scale_offset,
            offs_n,
            GROUP,
        )
        if BIAS:
            bias_ptr = weight_pointer(address + bias_at, h_ptr, 1)
            bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)
            part += bias.to(tl.float32)[None, :]
            if COPY:
                bias_ptr = weight_pointer(copy_to + bias_at, h_ptr, 1)
                tl.store(bias_ptr + offs_n, bias, mask=offs_n < tl.where(copy_to != 0, H, 0))
        part = tl.sum(w, axis=1)[:, None] * part
        out_ptrs = out_ptr + row[:, None] * H + offs_n[None, :]
        tl.store(out_ptrs, part, mask=mask_t[:, None] & mask_n[None, :])
    tl.debug_barrier()  # every thread has stored before one of them says so
    arrived = tl.atomic_add(arrived_ptr + pid_n, 1, sem="acq_rel")
    if arrived == tl.num_programs(0) - 1:
        total = _sum_tokens(out_ptr, ids, address_ptr, K, H, offs_n, BLOCK_M, BLOCK_N, CHOICES)
        offs_t = tl.arange(0, BLOCK_M)
        y_ptrs = y_ptr + offs_t[:, None] * H + offs_n[None, :]
        mask = (offs_t < T)[:, None] & mask_n[None, :]
        tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=mask)


def expert_ffn_tokens(
    x: Tensor, ids: Tensor, weights: Tensor, table: Any, y: Tensor, config: FFNConfig
) -> None:
    """Fills y [T, H] for T <= config.gate_up.block_m; arguments as of `expert_ffn`."""
    (T, H), K, layout = x.shape, ids.shape[1], table.layout
    E, inter = layout.num_experts, layout.intermediate
    gate_up, down = config.gate_up, config.down
    columns = triton.cdiv(H, down.block_n)
    h = x.new_empty(T * K, inter)
    out = torch.empty(T * K, H, dtype=torch.float32, device=x.device)
    arrived = torch.empty(columns, dtype=torch.int32, device=x.device)
    by_pair = T * K < E
    programs = T * K if by_pair else E
    common = {
        "T": T,
        "K": K,
        "E": E,
        "H": H,
        "inter": inter,
        "BY_PAIR": by_pair,
        "CHOICES": triton.next_power_of_2(K),
    }
    _gate_up_tokens_kernel[(programs, triton.cdiv(inter, gate_up.block_n))](
        x,
        x.stride(0),
        ids,
        h,
        arrived,
        columns,
        longest=LONGEST,
        COLUMNS=triton.next_power_of_2(columns),
        EVEN_K=H % gate_up.block_k == 0,
        **common,
        **place_args(table),
        **copy_args(table),
        **gate_up_args(table),
        **quantized_args(table, "gate_up"),
        **gate_up.launch(),
    )
    _down_tokens_kernel[(programs, columns)](
        h,
        ids,
        weights,
        out,
        arrived,
        y,
        EVEN_K=inter % down.block_k == 0,
        **common,
        **copy_args(table),
        **down_args(table),
        **quantized_args(table, "down"),
        **down.launch(),
    )
