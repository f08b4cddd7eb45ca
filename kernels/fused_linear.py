"""Dense layers over a few tokens: every weight is read once, by programs enough to fill the GPU.

Up to three matrices that share an input (queries, keys, values) are one product. A product is left
in parts, fp32 [parts, T, N] over pieces of the sum, which the kernel that reads it adds up in order
(`load_parts`): no launch and no atomics for that. A gate and an up matrix end in their activation.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from spac.kernels.common import activate, gate_up_tile, matmul_tile
from spac.kernels.config import TOKEN_ROWS, Tile, device_of, fit
from spac.kernels.pdl import let_next_start, pdl_args, prefetch, wait_for_previous

_PROGRAMS = 264  # two for each multiprocessor of an H200
_PIECE = 256  # the shortest sum of a part


@triton.jit
def load_parts(ptrs, mask, stride, PARTS: tl.constexpr, DTYPE: tl.constexpr):
    """The sum of the parts at `ptrs` + p * stride, in order, rounded to DTYPE."""
    total = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    for p in tl.static_range(1, PARTS):
        total += tl.load(ptrs + p * stride, mask=mask, other=0.0).to(tl.float32)
    return total.to(DTYPE)


def parts_args(parts: Tensor, dtype: torch.dtype) -> dict[str, object]:
    """Keyword arguments of every kernel that reads `parts` [P, T, N] as values of `dtype`."""
    kind = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    return {"stride_p": parts.stride(0), "PARTS": parts.shape[0], "DTYPE": kind[dtype]}


@triton.jit(do_not_specialize=["T"])
def _linear_kernel(
    x_ptr,
    stride_xt,
    w_ptr,
    second,
    third,
    rows_1,
    rows_2,
    out_ptr,
    T,
    N,
    K,
    piece,
    EARLY: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[p, t, n] = x_t . row n of the matrices, over the p-th `piece` of K. Grid (blocks of N,
    parts).

    The matrices lie behind w_ptr one below the other, but from row rows_1 on `second` elements
    further, from row rows_2 on `third`.
    """
    let_next_start(EARLY)
    part = tl.program_id(1)
    offs_t = tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    gap = tl.where(offs_n < rows_1, 0, tl.where(offs_n < rows_2, second, third))
    begin = part * piece
    end = tl.minimum(piece, K - begin)
    offs_w = offs_n.to(tl.int64) * K + gap + begin
    prefetch(w_ptr, offs_w, offs_n < N, end, 4, EARLY)
    wait_for_previous(EARLY)
    y = matmul_tile(
        x_ptr + begin,
        offs_t,
        stride_xt,
        offs_t < T,
        w_ptr,
        offs_w,
        offs_n < N,
        1,
        end,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EVEN_K,
    )
    at = (part * T + offs_t)[:, None] * N + offs_n[None, :]
    tl.store(out_ptr + at, y, mask=(offs_t < T)[:, None] & (offs_n < N)[None, :])


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
    EARLY: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[t, n] = act(gate_n . x_t) * up_n . x_t, up_offset elements between the matrices."""
    let_next_start(EARLY)
    offs_t = tl.arange(0, BLOCK_M)
    n0 = tl.program_id(0) * BLOCK_N
    offs_n = n0 + tl.arange(0, BLOCK_N)
    offs_w = offs_n.to(tl.int64) * K
    prefetch(gate_ptr, offs_w, offs_n < N, K, 8, EARLY)
    prefetch(gate_ptr, offs_w + up_offset, offs_n < N, K, 8, EARLY)
    wait_for_previous(EARLY)
    gate, up = gate_up_tile(
        x_ptr, offs_t, stride_xt, offs_t < T, gate_ptr, gate_ptr, K, 1, up_offset, 0, 0, n0, K, N,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, False, False,
    )  # fmt: skip
    # Rounded where torch rounds: the products, the activation, the result.
    dtype = out_ptr.dtype.element_ty
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    act = activate(gate, tl.full(gate.shape, 1.0, tl.float32), 0.0, 0.0, ACTIVATION)
    y = (act.to(dtype).to(tl.float32) * up).to(dtype)
    mask = (offs_t < T)[:, None] & (offs_n < N)[None, :]
    tl.store(out_ptr + offs_t[:, None] * N + offs_n[None, :], y, mask=mask)


@triton.jit
def _add_norm_kernel(
    x_ptr,
    parts_ptr,
    stride_p,
    weight_ptr,
    sum_ptr,
    out_ptr,
    K,
    eps,
    ADD: tl.constexpr,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    let_next_start(EARLY)
    offs = tl.arange(0, BLOCK)
    mask, at = offs < K, tl.program_id(0) * K + offs
    w = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    wait_for_previous(EARLY)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        y = load_parts(parts_ptr + at, mask, stride_p, PARTS, DTYPE)
        total = (x + y.to(tl.float32)).to(DTYPE)
        tl.store(sum_ptr + at, total, mask=mask)
        x = total.to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, axis=0) / K + eps)
    tl.store(out_ptr + at, (w * x.to(DTYPE).to(tl.float32)).to(DTYPE), mask=mask)


def fused_linear(x: Tensor, weights: list[Tensor]) -> Tensor:
    """x [T <= 16, K] times up to three matrices [N_i, K], in parts: fp32 [parts, T, sum of N_i].

    All of one dtype. Raises ValueError for other arguments.
    """
    T, K = _check(x, weights, 3)
    first, rows = weights[0], [w.shape[0] for w in weights]
    N = sum(rows)
    tile = _tile(x, 32, 1)
    blocks = triton.cdiv(N, tile.block_n)
    parts = max(1, min(2 ** round(math.log2(max(1, _PROGRAMS / blocks))), K // _PIECE))
    piece = triton.cdiv(triton.cdiv(K, parts), tile.block_k) * tile.block_k
    parts = triton.cdiv(K, piece)
    out = torch.empty(parts, T, N, dtype=torch.float32, device=x.device)
    gaps = [_gap(first, w, sum(rows[:i])) for i, w in enumerate(weights)]
    _linear_kernel[(blocks, parts)](
        x,
        x.stride(0),
        first,
        gaps[min(1, len(gaps) - 1)],
        gaps[-1],
        rows[0],
        sum(rows[:2]),
        out,
        T=T,
        N=N,
        K=K,
        piece=piece,
        **pdl_args(x.device, read_early=weights),
        EVEN_K=K % tile.block_k == 0,
        **tile.launch(),
    )
    return out


def fused_gated(x: Tensor, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(x gate^T) * (x up^T) for x [T <= 16, K], gate and up [N, K]: [T, N]."""
    T, K = _check(x, [gate, up], 2)
    N = gate.shape[0]
    out = torch.empty(T, N, dtype=x.dtype, device=x.device)
    tile = _tile(x, 16, 2)
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
        **pdl_args(x.device, read_early=[gate, up]),
        EVEN_K=K % tile.block_k == 0,
        **tile.launch(),
    )
    return out


def add_norm(
    x: Tensor, parts: Tensor | None, weight: Tensor, eps: float, chained: bool = True
) -> tuple[Tensor, Tensor]:
    """x [T, K] plus the sum of `parts` [P, T, K], and RMSNorm of that, rounded as transformers has
    it. x and weight [K] of one dtype. chained: see kernels/pdl.py."""
    T, K = x.shape
    x = x.contiguous()
    if parts is not None and (parts.shape[1:] != x.shape or not parts.is_contiguous()):
        raise ValueError(f"parts: expected [P, {T}, {K}] in one piece, got {list(parts.shape)}")
    total = x if parts is None else torch.empty_like(x)
    out = torch.empty_like(x)
    _add_norm_kernel[(T,)](
        x,
        x if parts is None else parts,
        weight_ptr=weight,
        sum_ptr=total,
        out_ptr=out,
        K=K,
        eps=eps,
        ADD=parts is not None,
        BLOCK=triton.next_power_of_2(K),
        num_warps=8,
        **pdl_args(x.device, chained),
        **parts_args(x[None] if parts is None else parts, x.dtype),
    )
    return total, out


def _tile(x: Tensor, block_n: int, columns: int) -> Tile:
    if x.dtype == torch.float32:
        return Tile(TOKEN_ROWS, 16, 64, 4, 2)
    shared = device_of(x.device).shared
    return fit(Tile(TOKEN_ROWS, block_n, 128, 4, 5), columns, x.element_size(), shared)


def _gap(first: Tensor, other: Tensor, rows: int) -> int:
    """Elements between where `other` begins and where `first` would have its row `rows`."""
    return (other.data_ptr() - first.data_ptr()) // first.element_size() - rows * first.shape[1]


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
