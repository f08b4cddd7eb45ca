"""Dense layers over a few tokens: every weight is read once, in one launch.

Up to three matrices that share an input (queries, keys, values) are one product; a gate and an up
matrix end in their activation; a residual is added behind.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spac.kernels.common import activate, gate_up_tile, matmul_tile
from spac.kernels.config import TOKEN_ROWS, Tile, device_of, fit


@triton.jit
def _store(out_ptr, residual_ptr, y, T, N, offs_n, ADD: tl.constexpr, BLOCK_M: tl.constexpr):
    offs_t = tl.arange(0, BLOCK_M)
    at = offs_t[:, None] * N + offs_n[None, :]
    mask = (offs_t < T)[:, None] & (offs_n < N)[None, :]
    y = y.to(out_ptr.dtype.element_ty)
    if ADD:  # as torch does: the product is rounded first
        y = y.to(tl.float32) + tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _linear_kernel(
    x_ptr,
    stride_xt,
    w_ptr,
    second,
    third,
    rows_1,
    rows_2,
    residual_ptr,
    out_ptr,
    T,
    N,
    K,
    ADD: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[t, n] = x_t . row n of the matrices one below the other. Grid (blocks of N,).

    Rows up to rows_1 lie behind w_ptr, up to rows_2 `second` elements further than if the first
    matrix went on, then `third`.
    """
    offs_t = tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    gap = tl.where(offs_n < rows_1, 0, tl.where(offs_n < rows_2, second, third))
    y = matmul_tile(
        x_ptr,
        offs_t,
        stride_xt,
        offs_t < T,
        w_ptr,
        offs_n.to(tl.int64) * K + gap,
        offs_n < N,
        1,
        K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EVEN_K,
    )
    _store(out_ptr, residual_ptr, y, T, N, offs_n, ADD, BLOCK_M)


@triton.jit(do_not_specialize=["T"])
def _gated_kernel(
    x_ptr,
    stride_xt,
    gate_ptr,
    up_offset,
    out_ptr,
    T,
    N,
    K,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[t, n] = act(gate_n . x_t) * up_n . x_t, up_offset elements between the matrices."""
    offs_t = tl.arange(0, BLOCK_M)
    n0 = tl.program_id(0) * BLOCK_N
    gate, up = gate_up_tile(
        x_ptr, offs_t, stride_xt, offs_t < T, gate_ptr, gate_ptr, K, 1, up_offset, 0, 0, n0, K, N,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, False, False,
    )  # fmt: skip
    # Rounded where torch rounds: the products, the activation, the result.
    dtype = out_ptr.dtype.element_ty
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    act = activate(gate, tl.full(gate.shape, 1.0, tl.float32), 0.0, 0.0, ACTIVATION)
    y = act.to(dtype).to(tl.float32) * up
    _store(out_ptr, out_ptr, y, T, N, n0 + tl.arange(0, BLOCK_N), False, BLOCK_M)


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, K, eps, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0) * K, tl.arange(0, BLOCK)
    mask = offs < K
    x = tl.load(x_ptr + row + offs, mask=mask, other=0.0)
    w = tl.load(weight_ptr + offs, mask=mask, other=0.0)
    x32 = x.to(tl.float32)
    x32 *= tl.rsqrt(tl.sum(x32 * x32, axis=0) / K + eps)
    y = x32.to(x.dtype).to(tl.float32) * w.to(tl.float32)
    tl.store(out_ptr + row + offs, y.to(out_ptr.dtype.element_ty), mask=mask)


def _tile(x: Tensor, columns: int) -> Tile:
    if x.dtype == torch.float32:
        return Tile(TOKEN_ROWS, 16, 64, 4, 2)
    return fit(
        Tile(TOKEN_ROWS, 16, 256, 4, 5), columns, x.element_size(), device_of(x.device).shared
    )


def _gap(first: Tensor, other: Tensor, rows: int) -> int:
    """Elements between where `other` begins and where `first` would have its row `rows`."""
    return (other.data_ptr() - first.data_ptr()) // first.element_size() - rows * first.shape[1]


def fused_linear(x: Tensor, weights: list[Tensor], residual: Tensor | None = None) -> Tensor:
    """x [T <= 16, K] times up to three matrices [N_i, K]: [T, sum of N_i], plus `residual`.

    All of one dtype, which is the result's; sums in fp32. Raises ValueError for other arguments.
    """
    T, K = _check(x, weights, 3)
    first, rows = weights[0], [w.shape[0] for w in weights]
    N = sum(rows)
    out = torch.empty(T, N, dtype=x.dtype, device=x.device)
    if residual is not None and (residual.shape != out.shape or not residual.is_contiguous()):
        raise ValueError(f"residual: expected {[T, N]} in one piece, got {list(residual.shape)}")
    gaps = [_gap(first, w, sum(rows[:i])) for i, w in enumerate(weights)]
    tile = _tile(x, 1)
    _linear_kernel[(triton.cdiv(N, tile.block_n),)](
        x,
        x.stride(0),
        first,
        gaps[min(1, len(gaps) - 1)],
        gaps[-1],
        rows[0],
        sum(rows[:2]),
        out if residual is None else residual,
        out,
        T=T,
        N=N,
        K=K,
        ADD=residual is not None,
        EVEN_K=K % tile.block_k == 0,
        **tile.launch(),
    )
    return out


def fused_gated(x: Tensor, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(x gate^T) * (x up^T) for x [T <= 16, K], gate and up [N, K]: [T, N]."""
    T, K = _check(x, [gate, up], 2)
    N = gate.shape[0]
    out = torch.empty(T, N, dtype=x.dtype, device=x.device)
    tile = _tile(x, 2)
    _gated_kernel[(triton.cdiv(N, tile.block_n),)](
        x,
        x.stride(0),
        gate,
        _gap(gate, up, 0),
        out,
        T=T,
        N=N,
        K=K,
        ACTIVATION=activation,
        EVEN_K=K % tile.block_k == 0,
        **tile.launch(),
    )
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) for rows x [T, K], rounded as transformers' RMSNorm."""
    out = torch.empty_like(x)
    T, K = x.shape
    _rms_norm_kernel[(T,)](
        x.contiguous(), weight, out, K, eps, BLOCK=triton.next_power_of_2(K), num_warps=8
    )
    return out


def _check(x: Tensor, weights: list[Tensor], most: int) -> tuple[int, int]:
    shapes = [list(w.shape) for w in weights]
    if x.dim() != 2 or not 1 <= x.shape[0] <= TOKEN_ROWS or x.stride(1) != 1:
        raise ValueError(f"x: expected [1..{TOKEN_ROWS}, K], got {list(x.shape)}")
    if not 1 <= len(weights) <= most or any(
        w.shape[1:] != x.shape[1:] or w.dtype != x.dtype or not w.is_contiguous() for w in weights
    ):
        raise ValueError(
            f"weights: expected up to {most} of [N, {x.shape[1]}] in {x.dtype}, got {shapes}"
        )
    return x.shape[0], x.shape[1]
