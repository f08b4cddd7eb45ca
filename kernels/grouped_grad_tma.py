"""The products of the backward pass on Hopper, with descriptors: see `kernels/grouped_tma.py`."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from spac.kernels.common import store_hidden_grad
from spac.kernels.config import Tile
from spac.kernels.dot import dot
from spac.kernels.plan import Plan, this_tile


@triton.jit
def _hidden_grad_tma_kernel(
    dy_ptr,
    w_desc,
    weights_ptr,
    pre_ptr,
    d_pre_ptr,
    wa_ptr,
    dot_ptr,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As `_hidden_grad_kernel`; rows that nobody computes get zeros, since the weight gradients
    read them beside others'."""
    tile, block, used = this_tile(tile_rows_ptr, blocks_n)
    row0 = tl.load(tile_row_ptr + tile)
    offs_m = tl.arange(0, BLOCK_M)
    rows = (row0 + offs_m).to(tl.int64)
    n0 = block * BLOCK_N
    if used <= 0:
        offs = n0 + tl.arange(0, BLOCK_N)
        inside = (offs_m < -used)[:, None] & (offs < inter)[None, :]
        zero = tl.zeros((BLOCK_M, BLOCK_N), d_pre_ptr.dtype.element_ty)
        tl.store(wa_ptr + rows[:, None] * inter + offs[None, :], zero, mask=inside)
        both = d_pre_ptr + rows[:, None] * (2 * inter) + offs[None, :]
        tl.store(both, zero, mask=inside)
        tl.store(both + inter, zero, mask=inside)
        return
    pairs = tl.load(order_ptr + row0 + tl.minimum(offs_m, used - 1)).to(tl.int64)
    slot = tl.load(tile_slot_ptr + tile)
    dy_ptrs = dy_ptr + (pairs // K)[:, None] * H + tl.arange(0, BLOCK_K)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tl.assume(H > 0)
    for k0 in range(0, H, BLOCK_K):
        a = tl.load(dy_ptrs)
        w = w_desc.load([slot, k0, n0]).reshape(BLOCK_K, BLOCK_N)
        acc = dot(a, w, acc)
        dy_ptrs += BLOCK_K
    mask_m = offs_m < used
    weight = tl.load(weights_ptr + pairs, mask=mask_m, other=0.0).to(tl.float32)[:, None]
    # In two halves: what both need beside the accumulator at once would not fit the registers.
    HALF: tl.constexpr = BLOCK_N // 2
    left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    offs_n = n0 + tl.arange(0, HALF)
    dots = store_hidden_grad(
        left, rows, offs_n, mask_m, weight, pre_ptr, d_pre_ptr, wa_ptr, alpha, limit, inter,
        ACTIVATION, INTERLEAVED,
    )  # fmt: skip
    dots += store_hidden_grad(
        right, rows, offs_n + HALF, mask_m, weight, pre_ptr, d_pre_ptr, wa_ptr, alpha, limit,
        inter, ACTIVATION, INTERLEAVED,
    )  # fmt: skip
    tl.store(dot_ptr + pairs * blocks_n + block, dots, mask=mask_m)


@triton.jit
def _outer_tma_kernel(
    tokens_ptr,
    stride_t,
    rows_desc,
    out_ptr,
    stride_oe,
    stride_om,
    stride_on,
    order_ptr,
    offsets_ptr,
    M,
    N,
    blocks_n,
    K: tl.constexpr,
    GATHER_A: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As `_outer_kernel`; rows behind an expert's last, which a descriptor reads as well, meet
    zeros. Grid (blocks of M * blocks of N, E)."""
    pid = tl.program_id(0)
    e = tl.program_id(1)
    pid_m = pid // blocks_n
    m0 = pid_m * BLOCK_M
    n0 = (pid - pid_m * blocks_n) * BLOCK_N
    offs_m = m0 + tl.arange(0, BLOCK_M)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    begin = tl.load(offsets_ptr + e)
    end = tl.load(offsets_ptr + e + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # A step's pairs are loaded one step before: loads that wait for loads would halve the stages.
    pairs = tl.load(order_ptr + begin + offs_k, mask=offs_k < end - begin, other=0)
    for r0 in range(begin, end, BLOCK_K):
        mask_r = offs_k < end - r0
        token_ptrs = tokens_ptr + (pairs // K).to(tl.int64)[:, None] * stride_t
        later = offs_k + r0 + BLOCK_K
        pairs = tl.load(order_ptr + later, mask=later < end, other=0)
        if GATHER_A:
            mask = mask_r[:, None] & (offs_m < M)[None, :]
            a = tl.load(token_ptrs + offs_m[None, :], mask=mask, other=0.0)
            b = rows_desc.load([r0, n0])
        else:
            a = rows_desc.load([r0, m0])
            mask = mask_r[:, None] & (offs_n < N)[None, :]
            b = tl.load(token_ptrs + offs_n[None, :], mask=mask, other=0.0)
        acc = dot(a.T, b, acc)
    out_ptrs = out_ptr + e.to(tl.int64) * stride_oe
    out_ptrs += offs_m[:, None].to(tl.int64) * stride_om + offs_n[None, :].to(tl.int64) * stride_on
    inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)


def hidden_grad_tma(
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
    layout, H, w = table.layout, dy.shape[1], table.slots.down
    blocks_n = dots.shape[1]
    _hidden_grad_tma_kernel[(plan.tiles * blocks_n,)](
        dy,
        TensorDescriptor(w, [*w.shape], [*w.stride()], [1, tile.block_k, tile.block_n]),
        weights,
        pre,
        d_pre,
        wa,
        dots,
        plan.order,
        plan.tile_row,
        plan.tile_rows,
        plan.tile_slot,
        alpha=layout.alpha,
        limit=layout.limit,
        H=H,
        inter=layout.intermediate,
        blocks_n=blocks_n,
        K=plan.top_k,
        ACTIVATION=layout.activation,
        INTERLEAVED=layout.interleaved,
        **(tile.launch() | {"BLOCK_M": plan.block_m}),
    )


def outer_tma(a: Tensor, b: Tensor, plan: Plan, gather: str, out: Tensor, tile: Tile) -> None:
    """As `grouped_outer`; the side by token, "a" or "b", has tile.block_m columns."""
    (E, M, N), k = out.shape, tile.block_k
    tokens, rows = (a, b) if gather == "a" else (b, a)
    m, n = (tile.block_m, tile.block_n) if gather == "a" else (tile.block_n, tile.block_m)
    blocks_n = triton.cdiv(N, n)
    _outer_tma_kernel[(triton.cdiv(M, m) * blocks_n, E)](
        tokens,
        tokens.stride(0),
        TensorDescriptor.from_tensor(rows, [k, tile.block_n]),
        out,
        *out.stride(),
        plan.order,
        plan.offsets,
        M=M,
        N=N,
        blocks_n=blocks_n,
        K=plan.top_k,
        GATHER_A=gather == "a",
        **(tile.launch() | {"BLOCK_M": m, "BLOCK_N": n}),
    )
