"""Sums over the rows of each expert: gradients of weights and biases. No atomics."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from spac.kernels.common import dot
from spac.kernels.config import Tile
from spac.kernels.plan import Plan


@triton.jit
def _outer_kernel(
    a_ptr,
    stride_a,
    b_ptr,
    stride_b,
    out_ptr,
    stride_oe,
    stride_om,
    stride_on,
    order_ptr,
    offsets_ptr,
    M,
    N,
    K,
    blocks_n,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[e] = a[rows of e].T @ b[rows of e]; a gathered side is indexed by token, not by row.

    Grid (blocks of M * blocks of N, E). An expert without rows gets zeros.
    """
    pid = tl.program_id(0)
    e = tl.program_id(1)
    pid_m = pid // blocks_n
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid - pid_m * blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    begin = tl.load(offsets_ptr + e)
    end = tl.load(offsets_ptr + e + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r0 in range(begin, end, BLOCK_K):
        rows = r0 + tl.arange(0, BLOCK_K)
        mask_r = rows < end
        token = (tl.load(order_ptr + rows, mask=mask_r, other=0) // K).to(tl.int64)
        row = rows.to(tl.int64)
        a_rows = (token if GATHER_A else row) * stride_a
        b_rows = (token if GATHER_B else row) * stride_b
        a = tl.load(
            a_ptr + a_rows[None, :] + offs_m[:, None],
            mask=mask_m[:, None] & mask_r[None, :],
            other=0.0,
        )
        b = tl.load(
            b_ptr + b_rows[:, None] + offs_n[None, :],
            mask=mask_r[:, None] & mask_n[None, :],
            other=0.0,
        )
        acc = dot(a, b, acc)
    out_ptrs = out_ptr + e.to(tl.int64) * stride_oe
    out_ptrs += offs_m[:, None].to(tl.int64) * stride_om + offs_n[None, :].to(tl.int64) * stride_on
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _bias_grad_kernel(
    a_ptr,
    weights_ptr,
    out_ptr,
    stride_oe,
    stride_on,
    order_ptr,
    offsets_ptr,
    N,
    K,
    WEIGHTED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[e] = sum of a over the rows of e, or, WEIGHTED, of weight * a[token]. Grid (N, E)."""
    e = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    end = tl.load(offsets_ptr + e + 1)
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for r0 in range(tl.load(offsets_ptr + e), end, BLOCK_R):
        rows = r0 + tl.arange(0, BLOCK_R)
        mask_r = rows < end
        mask = mask_r[:, None] & mask_n[None, :]
        if WEIGHTED:
            pairs = tl.load(order_ptr + rows, mask=mask_r, other=0)
            weight = tl.load(weights_ptr + pairs, mask=mask_r, other=0.0).to(tl.float32)
            token = (pairs // K).to(tl.int64)
            a = tl.load(a_ptr + token[:, None] * N + offs_n[None, :], mask=mask, other=0.0)
            acc += weight[:, None] * a.to(tl.float32)
        else:
            row = rows.to(tl.int64)
            a = tl.load(a_ptr + row[:, None] * N + offs_n[None, :], mask=mask, other=0.0)
            acc += a.to(tl.float32)
    total = tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + e.to(tl.int64) * stride_oe + offs_n * stride_on, total, mask=mask_n)


def grouped_outer(a: Tensor, b: Tensor, plan: Plan, gather: str, out: Tensor, tile: Tile) -> None:
    """Fills out [E, M, N] (any strides); `gather` "a" or "b" is the side with a row per token."""
    E, M, N = out.shape
    blocks_n = triton.cdiv(N, tile.block_n)
    _outer_kernel[(triton.cdiv(M, tile.block_m) * blocks_n, E)](
        a,
        a.stride(0),
        b,
        b.stride(0),
        out,
        *out.stride(),
        plan.order,
        plan.offsets,
        M=M,
        N=N,
        K=plan.top_k,
        blocks_n=blocks_n,
        GATHER_A=gather == "a",
        GATHER_B=gather == "b",
        **tile.launch(),
    )


def grouped_bias_grad(a: Tensor, weights: Tensor | None, plan: Plan, out: Tensor) -> None:
    """Fills out [E, N]: sums of a [P, N] by row, or of weights * a [T, N] by token."""
    E, N = out.shape
    block_n = 128
    _bias_grad_kernel[(triton.cdiv(N, block_n), E)](
        a,
        a if weights is None else weights,
        out,
        *out.stride(),
        plan.order,
        plan.offsets,
        N=N,
        K=plan.top_k,
        WEIGHTED=weights is not None,
        BLOCK_R=16,
        BLOCK_N=block_n,
        num_warps=4,
    )
