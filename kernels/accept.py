"""Which drafted tokens the target accepts, and the token after them.

The vocabulary is cut into pieces so that a few rows fill the GPU. Probabilities are never stored:
each pass recomputes exp(logit - max) / sum from the logits. Everything stays on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _argmax_kernel(logits_ptr, stride_w, value_ptr, index_ptr, V, piece, BLOCK: tl.constexpr):
    """Largest logit of each piece and its lowest index; NaN counts as the largest.

    Grid (W, pieces).
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = part * piece
    end = tl.minimum(begin + piece, V)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    index = begin + tl.arange(0, BLOCK)
    for v0 in range(begin, end, BLOCK):
        offs_v = v0 + tl.arange(0, BLOCK)
        v = tl.load(logits_ptr + row * stride_w + offs_v, mask=offs_v < end, other=float("-inf"))
        v = v.to(tl.float32)
        v = tl.where(v != v, float("inf"), v)
        index = tl.where(v > best, offs_v, index)
        best = tl.maximum(v, best)
    top = tl.max(best, axis=0)
    slot = row * tl.num_programs(1) + part
    tl.store(value_ptr + slot, top)
    tl.store(index_ptr + slot, tl.min(tl.where(best == top, index, V), axis=0))


@triton.jit
def _greedy_kernel(
    value_ptr,
    index_ptr,
    draft_ptr,
    out_ptr,
    gamma,
    pieces,
    V,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Joins the pieces and finds the accepted prefix. Grid (1,)."""
    offs_w = tl.arange(0, ROWS)
    offs_s = tl.arange(0, PIECES)
    slots = offs_w[:, None] * pieces + offs_s[None, :]
    mask = (offs_w[:, None] <= gamma) & (offs_s[None, :] < pieces)
    value = tl.load(value_ptr + slots, mask=mask, other=float("-inf"))
    index = tl.load(index_ptr + slots, mask=mask, other=V)
    top = tl.max(value, axis=1)
    choice = tl.min(tl.where(value == top[:, None], index, V), axis=1)
    draft = tl.load(draft_ptr + offs_w, mask=offs_w < gamma, other=-1)
    accepted = tl.min(tl.where(choice == draft, gamma, tl.minimum(offs_w, gamma)), axis=0)
    tl.store(out_ptr, accepted.to(tl.int64))
    tl.store(out_ptr + 1, tl.sum(tl.where(offs_w == accepted, choice, 0), axis=0).to(tl.int64))


@triton.jit
def _softmax_kernel(logits_ptr, stride_w, max_ptr, sum_ptr, V, piece, BLOCK: tl.constexpr):
    """Maximum and sum of exp(logit - maximum) of each piece. Grid (W, pieces)."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = part * piece
    end = tl.minimum(begin + piece, V)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for v0 in range(begin, end, BLOCK):
        offs_v = v0 + tl.arange(0, BLOCK)
        v = tl.load(logits_ptr + row * stride_w + offs_v, mask=offs_v < end, other=float("-inf"))
        v = v.to(tl.float32)
        new = tl.maximum(top, v)
        safe = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf is NaN
        total = total * tl.exp(top - safe) + tl.exp(v - safe)
        top = new
    peak = tl.max(top, axis=0)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    slot = row * tl.num_programs(1) + part
    tl.store(max_ptr + slot, peak)
    tl.store(sum_ptr + slot, tl.sum(total * tl.exp(top - safe), axis=0))


@triton.jit
def _residual(
    logits_ptr,
    probs_ptr,
    draft_token,
    peak,
    total,
    offs_v,
    V,
    rejected,
    HAS_PROBS: tl.constexpr,
):
    """fp64 weight of each token for the next draw: p, or max(p - q, 0) after a rejection."""
    mask = offs_v < V
    v = tl.load(logits_ptr + offs_v, mask=mask, other=float("-inf")).to(tl.float32)
    p = tl.exp(v - peak).to(tl.float64) / total
    if HAS_PROBS:
        q = tl.load(probs_ptr + offs_v, mask=mask & (offs_v < rejected * V), other=0.0)
        return tl.maximum(p - q.to(tl.float64), 0.0)
    else:
        return tl.where(offs_v == draft_token, 0.0, p)


@triton.jit
def _accept_sums_kernel(
    logits_ptr,
    stride_w,
    probs_ptr,
    stride_q,
    draft_ptr,
    uniform_ptr,
    max_ptr,
    sum_ptr,
    row_ptr,
    scale_ptr,
    weight_ptr,
    gamma,
    pieces,
    V,
    piece,
    HAS_PROBS: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every program finds the accepted prefix, then weighs one piece of the row after it.

    Grid (pieces of the weights,). row = accepted, draft token or -1; scale = maximum, sum.
    """
    offs_w = tl.arange(0, ROWS)
    offs_s = tl.arange(0, PIECES)
    slots = offs_w[:, None] * pieces + offs_s[None, :]
    mask = (offs_w[:, None] <= gamma) & (offs_s[None, :] < pieces)
    tops = tl.load(max_ptr + slots, mask=mask, other=float("-inf"))
    sums = tl.load(sum_ptr + slots, mask=mask, other=0.0)
    peaks = tl.max(tops, axis=1)
    safe = tl.where(peaks == float("-inf"), 0.0, peaks)
    totals = tl.sum((sums * tl.exp(tops - safe[:, None])).to(tl.float64), axis=1)

    drafted = offs_w < gamma
    draft = tl.load(draft_ptr + offs_w, mask=drafted, other=0)
    rows = offs_w.to(tl.int64)
    v = tl.load(logits_ptr + rows * stride_w + draft, mask=drafted, other=0.0).to(tl.float32)
    p = tl.exp(v - safe).to(tl.float64)
    u = tl.load(uniform_ptr + offs_w, mask=drafted, other=0.0).to(tl.float64)
    if HAS_PROBS:
        q = tl.load(probs_ptr + rows * stride_q + draft, mask=drafted, other=0.0).to(tl.float64)
        u = u * q
    # p is not divided by its total: u * total < p needs no division.
    agree = drafted & (u * totals < p)
    accepted = tl.min(tl.where(agree, gamma, tl.minimum(offs_w, gamma)), axis=0)
    at = offs_w == accepted
    peak = tl.sum(tl.where(at, safe, 0.0), axis=0)
    total = tl.sum(tl.where(at, totals, 0.0), axis=0)
    rejected = (accepted < gamma).to(tl.int32)
    token = tl.sum(tl.where(at & drafted, draft, 0), axis=0)
    token = tl.where(rejected != 0, token, -1)

    part = tl.program_id(0)
    if part == 0:
        tl.store(row_ptr, accepted.to(tl.int64))
        tl.store(row_ptr + 1, token.to(tl.int64))
        tl.store(scale_ptr, peak.to(tl.float64))
        tl.store(scale_ptr + 1, total)
    begin = part * piece
    weight = tl.zeros((BLOCK,), tl.float64)
    row = accepted.to(tl.int64)
    for v0 in range(begin, tl.minimum(begin + piece, V), BLOCK):
        weight += _residual(
            logits_ptr + row * stride_w,
            probs_ptr + row * stride_q,
            token,
            peak,
            total,
            v0 + tl.arange(0, BLOCK),
            V,
            rejected,
            HAS_PROBS,
        )
    tl.store(weight_ptr + part, tl.sum(weight, axis=0))


@triton.jit
def _draw_kernel(
    logits_ptr,
    stride_w,
    probs_ptr,
    stride_q,
    uniform_ptr,
    row_ptr,
    scale_ptr,
    weight_ptr,
    out_ptr,
    gamma,
    pieces,
    V,
    piece,
    HAS_PROBS: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Inverse CDF: the piece in which u * total falls, then the token in it. Grid (1,)."""
    offs_s = tl.arange(0, PIECES)
    weight = tl.load(weight_ptr + offs_s, mask=offs_s < pieces, other=0.0)
    cdf = tl.cumsum(weight, axis=0)
    target = tl.load(uniform_ptr + gamma).to(tl.float64) * tl.sum(weight, axis=0)
    above = tl.min(tl.where((cdf > target) & (weight > 0), offs_s, PIECES), axis=0)
    # Rounding may put the target past the end: then the last piece that has any weight.
    part = tl.where(above < PIECES, above, tl.max(tl.where(weight > 0, offs_s, 0), axis=0))
    begin = part * piece
    passed = tl.sum(tl.where(offs_s < part, weight, 0.0), axis=0)
    row = tl.load(row_ptr)
    token = tl.load(row_ptr + 1)
    peak = tl.load(scale_ptr).to(tl.float32)
    total = tl.load(scale_ptr + 1)
    first = V
    last = begin
    for v0 in range(begin, tl.minimum(begin + piece, V), BLOCK):
        offs_v = v0 + tl.arange(0, BLOCK)
        r = _residual(
            logits_ptr + row * stride_w,
            probs_ptr + row * stride_q,
            token,
            peak,
            total,
            offs_v,
            V,
            (row < gamma).to(tl.int32),
            HAS_PROBS,
        )
        inside = (passed + tl.cumsum(r, axis=0) > target) & (r > 0)
        first = tl.minimum(first, tl.min(tl.where(inside, offs_v, V), axis=0))
        last = tl.maximum(last, tl.max(tl.where(r > 0, offs_v, begin), axis=0))
        passed += tl.sum(r, axis=0)
    tl.store(out_ptr, row)
    tl.store(out_ptr + 1, tl.where(first < V, first, last).to(tl.int64))


def _check(logits: Tensor, draft: Tensor) -> Tensor:
    if logits.dim() != 2 or logits.shape[0] != draft.numel() + 1:
        raise ValueError(f"logits: expected [{draft.numel() + 1}, V], got {list(logits.shape)}")
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _pieces(vocabulary: int, rows: int, block: int) -> tuple[int, int]:
    """(pieces, tokens in a piece) so that `rows` rows give about 256 programs."""
    piece = triton.cdiv(triton.cdiv(vocabulary, max(1, min(64, 256 // rows))), block) * block
    return triton.cdiv(vocabulary, piece), piece


def accept_greedy(logits: Tensor, draft: Tensor) -> Tensor:
    """As `spac.reference.accept_greedy`: int64 [2] = (accepted, next token). Two launches.

    logits [W, V] float, draft int64 [W - 1].
    """
    logits = _check(logits, draft)
    (W, V), device = logits.shape, logits.device
    block = 1024
    pieces, piece = _pieces(V, W, block)
    value = torch.empty(W, pieces, dtype=torch.float32, device=device)
    index = torch.empty(W, pieces, dtype=torch.int32, device=device)
    out = torch.empty(2, dtype=torch.int64, device=device)
    _argmax_kernel[(W, pieces)](
        logits, logits.stride(0), value, index, V=V, piece=piece, BLOCK=block, num_warps=4
    )
    _greedy_kernel[(1,)](
        value,
        index,
        draft.contiguous(),
        out,
        gamma=W - 1,
        pieces=pieces,
        V=V,
        ROWS=triton.next_power_of_2(W),
        PIECES=triton.next_power_of_2(pieces),
        num_warps=4,
    )
    return out


def accept_sample(logits: Tensor, draft: Tensor, draft_probs: Tensor | None, u: Tensor) -> Tensor:
    """As `spac.reference.accept_sample`: int64 [2] = (accepted, next token). Three launches.

    logits [W, V] float, warped; draft int64 [W - 1]; draft_probs fp32 [W - 1, V] or None;
    u fp32 [W] uniform in [0, 1). Sums are in fp64, exponentials in fp32.
    """
    logits = _check(logits, draft)
    (W, V), device = logits.shape, logits.device
    if u.numel() != W:
        raise ValueError(f"u: expected [{W}], got {list(u.shape)}")
    if draft_probs is not None:
        if draft_probs.shape != (W - 1, V):
            raise ValueError(f"draft_probs: expected [{W - 1}, {V}], got {list(draft_probs.shape)}")
        draft_probs = draft_probs.contiguous()
    block = 1024
    pieces, piece = _pieces(V, W, block)
    tops, sums = (torch.empty(W, pieces, dtype=torch.float32, device=device) for _ in range(2))
    _softmax_kernel[(W, pieces)](
        logits, logits.stride(0), tops, sums, V=V, piece=piece, BLOCK=block, num_warps=4
    )
    weight_pieces, weight_piece = _pieces(V, 1, block)
    row = torch.empty(2, dtype=torch.int64, device=device)
    scale = torch.empty(2, dtype=torch.float64, device=device)
    weight = torch.empty(weight_pieces, dtype=torch.float64, device=device)
    out = torch.empty(2, dtype=torch.int64, device=device)
    draft, u = draft.contiguous(), u.contiguous()
    rows = (
        logits,
        logits.stride(0),
        logits if draft_probs is None else draft_probs,
        0 if draft_probs is None else V,
    )
    _accept_sums_kernel[(weight_pieces,)](
        *rows,
        draft,
        u,
        tops,
        sums,
        row,
        scale,
        weight,
        gamma=W - 1,
        pieces=pieces,
        V=V,
        piece=weight_piece,
        HAS_PROBS=draft_probs is not None,
        ROWS=triton.next_power_of_2(W),
        PIECES=triton.next_power_of_2(pieces),
        BLOCK=block,
        num_warps=4,
    )
    _draw_kernel[(1,)](
        *rows,
        u,
        row,
        scale,
        weight,
        out,
        gamma=W - 1,
        pieces=weight_pieces,
        V=V,
        piece=weight_piece,
        HAS_PROBS=draft_probs is not None,
        PIECES=triton.next_power_of_2(weight_pieces),
        BLOCK=block,
        num_warps=8,
    )
    return out
