"""Top-k softmax routing and the verify step behind it, in one launch.

A program routes one token; the last one to arrive verifies the whole window. The router's small
operators (softmax, top-k, renormalisation) would cost more than the experts of one token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spac.kernels.verify import Outputs, check_state, count_experts, empty_outputs, split_pairs

MAX_PAIRS = 1024  # beyond, one program would verify for longer than a second launch takes


@triton.jit
def _route_verify_kernel(
    logits_ptr,
    stride_w,
    weights_ptr,
    ids_ptr,
    arrived_ptr,
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
    num_pairs,
    E,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid (W,)."""
    w = tl.program_id(0)
    offs_e = tl.arange(0, EXPERTS)
    offs_j = tl.arange(0, CHOICES)
    mask_e = offs_e < E
    logits = tl.load(logits_ptr + w * stride_w + offs_e, mask=mask_e, other=float("-inf"))
    logits = logits.to(tl.float32)
    exps = tl.exp(logits - tl.max(logits, axis=0))
    left = tl.where(mask_e, exps / tl.sum(exps, axis=0), -1.0)
    weights = tl.zeros((CHOICES,), tl.float32)
    ids = tl.zeros((CHOICES,), tl.int32)
    for j in tl.static_range(K):
        best = tl.max(left, axis=0)
        e = tl.min(tl.where(left == best, offs_e, EXPERTS), axis=0)  # the lowest of equals
        weights = tl.where(offs_j == j, best, weights)
        ids = tl.where(offs_j == j, e, ids)
        left = tl.where(offs_e == e, -1.0, left)
    if NORMALIZE:
        weights = weights / tl.sum(weights, axis=0)
    tl.store(weights_ptr + w * K + offs_j, weights, mask=offs_j < K)
    tl.store(ids_ptr + w * K + offs_j, ids, mask=offs_j < K)
    tl.debug_barrier()  # every thread has stored before one of them says so
    arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel")
    if arrived == tl.num_programs(0) - 1:
        tl.store(arrived_ptr, 0)
        for p0 in range(0, num_pairs, BLOCK):
            split_pairs(
                p0 + tl.arange(0, BLOCK), ids_ptr, address_ptr, resident_ptr, cpu_ptr, order_ptr,
                num_pairs, E, BLOCK, CHUNK,
            )  # fmt: skip
        for e0 in range(0, E + 1, BLOCK):
            count_experts(
                e0 + tl.arange(0, BLOCK), ids_ptr, address_ptr, utility_ptr, bounds_ptr,
                counters_ptr, counts_ptr, offsets_ptr, max_utility, num_pairs, E, BLOCK, CHUNK,
            )  # fmt: skip


def route_verify(
    logits: Tensor,
    top_k: int,
    normalize: bool,
    address: Tensor,
    utility: Tensor,
    bounds: Tensor,
    counters: Tensor,
    arrived: Tensor,
    max_utility: int,
) -> tuple[Tensor, Tensor, Outputs]:
    """As `spac.reference.route` and then `verify` on its ids; arguments as of `ops.route_verify`.

    Raises ValueError for more than MAX_PAIRS pairs.
    """
    check_state(address, utility, bounds, counters)
    (W, E), device = logits.shape, logits.device
    if E != address.numel() or not 1 <= top_k <= E or W * top_k > MAX_PAIRS:
        raise ValueError(
            f"route_verify: expected logits [W, {address.numel()}], top_k in 1..{E} and at most "
            f"{MAX_PAIRS} pairs, got {list(logits.shape)} and top_k {top_k}"
        )
    weights = torch.empty(W, top_k, dtype=torch.float32, device=device)
    ids = torch.empty(W, top_k, dtype=torch.int32, device=device)
    outputs = empty_outputs(ids.shape, E, device)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    _route_verify_kernel[(W,)](
        logits,
        logits.stride(0),
        weights,
        ids,
        arrived,
        address,
        utility,
        bounds,
        counters,
        *outputs,
        max_utility,
        num_pairs=W * top_k,
        E=E,
        K=top_k,
        CHOICES=triton.next_power_of_2(top_k),
        NORMALIZE=normalize,
        EXPERTS=triton.next_power_of_2(E),
        BLOCK=32,
        CHUNK=min(256, max(16, triton.next_power_of_2(W * top_k))),
        num_warps=8 if W * top_k > 128 else 4,
    )
    return weights, ids, outputs
