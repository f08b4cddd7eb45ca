"""Top-k softmax routing and the verify step behind it, in one launch.

The first programs route a few tokens each, the others wait for them and do the work of `verify`.
Programs take their roles in the order in which they start, so those that are waited for run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spac.kernels import verify as verify_kernel
from spac.kernels.fused_linear import load_parts, parts_args
from spac.kernels.pdl import let_next_start, pdl_args, wait_for_previous
from spac.kernels.verify import Outputs, check_state, count_experts, empty_outputs, split_pairs

ROWS = 4  # tokens of a routing program: one for each of its warps


@triton.jit
def _route(
    row0,
    logits_ptr,
    stride_w,
    weights_ptr,
    ids_ptr,
    W,
    E,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    ROUND: tl.constexpr = False,
    stride_p=0,
    PARTS: tl.constexpr = 1,
    DTYPE: tl.constexpr = tl.float32,
):
    """Weights and ids of ROWS tokens from row0 on; ROUND: weights to DTYPE, that of the logits."""
    rows = row0 + tl.arange(0, ROWS)
    offs_e = tl.arange(0, EXPERTS)[None, :]
    offs_j = tl.arange(0, CHOICES)[None, :]
    mask = (rows < W)[:, None] & (offs_e < E)
    logits_ptrs = logits_ptr + rows[:, None] * stride_w + offs_e
    logits = load_parts(logits_ptrs, mask, stride_p, PARTS, DTYPE)
    logits = tl.where(offs_e < E, logits.to(tl.float32), float("-inf"))
    exps = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    left = tl.where(offs_e < E, exps / tl.sum(exps, axis=1)[:, None], -1.0)
    weights = tl.zeros((ROWS, CHOICES), tl.float32)
    ids = tl.zeros((ROWS, CHOICES), tl.int32)
    for j in tl.static_range(K):
        best = tl.max(left, axis=1)[:, None]
        e = tl.min(tl.where(left == best, offs_e, EXPERTS), axis=1)[:, None]  # lowest of equals
        weights = tl.where(offs_j == j, best, weights)
        ids = tl.where(offs_j == j, e, ids)
        left = tl.where(offs_e == e, -1.0, left)
    if NORMALIZE:
        weights = weights / tl.sum(weights, axis=1)[:, None]
    if ROUND:
        weights = weights.to(DTYPE).to(tl.float32)
    mask = (rows < W)[:, None] & (offs_j < K)
    tl.store(weights_ptr + rows[:, None] * K + offs_j, weights, mask=mask)
    tl.store(ids_ptr + rows[:, None] * K + offs_j, ids, mask=mask)


@triton.jit
def _route_kernel(
    logits_ptr,
    stride_w,
    weights_ptr,
    ids_ptr,
    W,
    E,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    ROUND: tl.constexpr,
    stride_p,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (blocks of ROWS tokens,)."""
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    _route(
        tl.program_id(0) * ROWS, logits_ptr, stride_w, weights_ptr, ids_ptr, W, E, K, CHOICES,
        NORMALIZE, EXPERTS, ROWS, ROUND, stride_p, PARTS, DTYPE,
    )  # fmt: skip


def route(
    logits: Tensor, top_k: int, normalize: bool, dtype: torch.dtype, rounded: bool
) -> tuple[Tensor, Tensor]:
    """As `spac.reference.route`, for logits [parts, W, E] as `fused_linear` leaves them.

    The logits' sum is rounded to `dtype`, with `rounded` the weights (fp32) as well.
    """
    _, W, E = logits.shape
    if not 1 <= top_k <= E:
        raise ValueError(f"top_k: expected 1..{E}, got {top_k}")
    weights = torch.empty(W, top_k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(W, top_k, dtype=torch.int32, device=logits.device)
    _route_kernel[(triton.cdiv(W, ROWS),)](
        logits_ptr=logits,
        stride_w=logits.stride(1),
        weights_ptr=weights,
        ids_ptr=ids,
        W=W,
        E=E,
        K=top_k,
        CHOICES=triton.next_power_of_2(top_k),
        NORMALIZE=normalize,
        EXPERTS=triton.next_power_of_2(E),
        ROWS=ROWS,
        ROUND=rounded,
        num_warps=ROWS,
        **pdl_args(logits.device),
        **parts_args(logits, dtype),
    )
    return weights, ids


@triton.jit
def _route_verify_kernel(
    logits_ptr,
    stride_w,
    weights_ptr,
    ids_ptr,
    progress_ptr,
    address_ptr,
    utility_ptr,
    bounds_ptr,
    counters_ptr,
    resident_ptr,
    cpu_ptr,
    counts_ptr,
    order_ptr,
    offsets_ptr,
    max_utility,
    W,
    num_pairs,
    E,
    blocks_r,
    blocks_p,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid (blocks of tokens + blocks of pairs + blocks of the experts and their end,).

    progress: programs started, routing programs done, programs done.
    """
    role = tl.atomic_add(progress_ptr, 1, sem="relaxed")
    if role < blocks_r:
        _route(
            role * ROWS, logits_ptr, stride_w, weights_ptr, ids_ptr, W, E, K, CHOICES, NORMALIZE,
            EXPERTS, ROWS,
        )  # fmt: skip
        tl.debug_barrier()  # every thread has stored before one of them says so
        tl.atomic_add(progress_ptr + 1, 1, sem="release")
    else:
        routed = tl.atomic_add(progress_ptr + 1, 0, sem="acquire")
        while routed < blocks_r:
            routed = tl.atomic_add(progress_ptr + 1, 0, sem="acquire")
        tl.debug_barrier()
        if role < blocks_r + blocks_p:
            split_pairs(
                (role - blocks_r) * BLOCK_P + tl.arange(0, BLOCK_P), ids_ptr, address_ptr,
                resident_ptr, cpu_ptr, order_ptr, num_pairs, E, BLOCK_P, CHUNK,
            )  # fmt: skip
        else:
            count_experts(
                (role - blocks_r - blocks_p) * BLOCK_E + tl.arange(0, BLOCK_E), ids_ptr,
                address_ptr, utility_ptr, bounds_ptr, counters_ptr, counts_ptr, offsets_ptr,
                max_utility, num_pairs, E, BLOCK_E, CHUNK,
            )  # fmt: skip
    if tl.atomic_add(progress_ptr + 2, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(progress_ptr + tl.arange(0, 4), tl.zeros((4,), tl.int32))


def route_verify(
    logits: Tensor,
    top_k: int,
    normalize: bool,
    address: Tensor,
    utility: Tensor,
    bounds: Tensor,
    counters: Tensor,
    progress: Tensor,
    max_utility: int,
) -> tuple[Tensor, Tensor, Outputs]:
    """As `spac.reference.route` and then `verify` on its ids; arguments as of `ops.route_verify`.

    Raises ValueError if the arguments do not fit each other.
    """
    check_state(address, utility, bounds, counters)
    (W, E), device = logits.shape, logits.device
    if E != address.numel() or not 1 <= top_k <= E:
        raise ValueError(
            f"route_verify: expected logits [W, {address.numel()}] and top_k in 1..{E}, "
            f"got {list(logits.shape)} and top_k {top_k}"
        )
    if progress.dtype != torch.int32 or progress.numel() != 4:
        raise ValueError(
            f"progress: expected int32 [4], got {progress.dtype} {list(progress.shape)}"
        )
    weights = torch.empty(W, top_k, dtype=torch.float32, device=device)
    ids = torch.empty(W, top_k, dtype=torch.int32, device=device)
    outputs = empty_outputs(ids.shape, E, device)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    pairs, block_p, block_e = W * top_k, verify_kernel.BLOCK_P, verify_kernel.BLOCK_E
    blocks_r, blocks_p = triton.cdiv(W, ROWS), triton.cdiv(pairs, block_p)
    _route_verify_kernel[(blocks_r + blocks_p + triton.cdiv(E + 1, block_e),)](
        logits,
        logits.stride(0),
        weights,
        ids,
        progress,
        address,
        utility,
        bounds,
        counters,
        *outputs,
        max_utility,
        W=W,
        num_pairs=pairs,
        E=E,
        blocks_r=blocks_r,
        blocks_p=blocks_p,
        K=top_k,
        CHOICES=triton.next_power_of_2(top_k),
        NORMALIZE=normalize,
        EXPERTS=triton.next_power_of_2(E),
        ROWS=ROWS,
        BLOCK_P=block_p,
        BLOCK_E=block_e,
        CHUNK=min(512, max(16, triton.next_power_of_2(pairs))),
        num_warps=ROWS,
    )
    return weights, ids, outputs
