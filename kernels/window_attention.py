"""Attention of a window's tokens over a static cache, from the projections to the heads' outputs.

Norm and rotary embedding of queries and keys, the new rows of the cache, and the attention itself,
which reads the cache as far as it is filled. The cached positions are shared out among programs
("flash decoding"), one more program of each key head has the window's own tokens; a second kernel
adds their parts in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spac.kernels.config import TOKEN_ROWS
from spac.kernels.dot import dot
from spac.kernels.fused_linear import load_parts, parts_args
from spac.kernels.pdl import let_next_start, pdl_args, prefetch, wait_for_previous

_BLOCK = 32  # cached positions that are read at a time
_PROGRAMS = 132


@triton.jit
def _norm(lo, hi, w_lo, w_hi, eps, D: tl.constexpr, AXIS: tl.constexpr):
    """RMSNorm of rows whose halves are lo and hi, rounded as transformers does."""
    dtype = lo.dtype
    lo32, hi32 = lo.to(tl.float32), hi.to(tl.float32)
    squares = tl.sum(lo32 * lo32, axis=AXIS) + tl.sum(hi32 * hi32, axis=AXIS)
    scale = tl.expand_dims(tl.rsqrt(squares / D + eps), AXIS)
    lo32, hi32 = (lo32 * scale).to(dtype).to(tl.float32), (hi32 * scale).to(dtype).to(tl.float32)
    return (w_lo.to(tl.float32) * lo32).to(dtype), (w_hi.to(tl.float32) * hi32).to(dtype)


@triton.jit
def _rotate(a, b, cos, sin, SIGN: tl.constexpr):
    """a * cos + SIGN * b * sin, every product rounded as torch does."""
    dtype = a.dtype
    a = (a.to(tl.float32) * cos.to(tl.float32)).to(dtype).to(tl.float32)
    b = (b.to(tl.float32) * sin.to(tl.float32)).to(dtype).to(tl.float32)
    return (a + SIGN * b).to(dtype)


@triton.jit
def _load_heads(
    x_ptr,
    stride_p,
    at,
    mask,
    norm_ptr,
    eps,
    cos_ptr,
    sin_ptr,
    rotary,
    D: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    AXIS: tl.constexpr,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Both halves of heads at offsets `at`, normalised and rotated.

    AXIS is that of the half's elements in the tiles: `at`, `mask` and `rotary` (offsets of cos and
    sin) have extent 1 there.
    """
    offs = tl.expand_dims(tl.arange(0, HALF), 1 - AXIS)
    half: tl.constexpr = D // 2
    mask = mask & (offs < half)
    lo = load_parts(x_ptr + at + offs, mask, stride_p, PARTS, DTYPE)
    hi = load_parts(x_ptr + at + half + offs, mask, stride_p, PARTS, DTYPE)
    if NORM:
        w_lo = tl.load(norm_ptr + offs, mask=offs < half, other=0.0)
        w_hi = tl.load(norm_ptr + half + offs, mask=offs < half, other=0.0)
        lo, hi = _norm(lo, hi, w_lo, w_hi, eps, D, AXIS)
    cos_lo = tl.load(cos_ptr + rotary + offs, mask=mask, other=0.0)
    cos_hi = tl.load(cos_ptr + rotary + half + offs, mask=mask, other=0.0)
    sin_lo = tl.load(sin_ptr + rotary + offs, mask=mask, other=0.0)
    sin_hi = tl.load(sin_ptr + rotary + half + offs, mask=mask, other=0.0)
    return _rotate(lo, hi, cos_lo, sin_lo, -1.0), _rotate(hi, lo, cos_hi, sin_hi, 1.0)


@triton.jit
def _step(q_lo, q_hi, k_lo, k_hi, v, mask, scale, top, total, acc):
    """Take the positions of k [HALF, N] (two halves) and v [N, D] into the running softmax."""
    scores = tl.zeros((q_lo.shape[0], v.shape[0]), tl.float32)
    scores = dot(q_hi, k_hi, dot(q_lo, k_lo, scores)) * scale
    scores = tl.where(mask, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    p = tl.exp2(scores - new_top[:, None])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(p, axis=1)
    acc = dot(p.to(v.dtype), v, acc * fade[:, None])
    return new_top, total, acc


@triton.jit
def _share(length_ptr, split, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Cached positions begin..end of a program; none for the one that has the window itself."""
    length = tl.load(length_ptr).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    begin = tl.minimum(split * share, length)
    return begin, tl.where(split == SPLITS, begin, tl.minimum(begin + share, length))


@triton.jit(do_not_specialize=["W"])
def _window_attention_kernel(
    qkv_ptr,
    stride_p,
    stride_t,
    cos_ptr,
    sin_ptr,
    stride_rotary,
    q_norm_ptr,
    k_norm_ptr,
    eps,
    keys_ptr,
    values_ptr,
    stride_head,
    length_ptr,
    part_ptr,
    top_ptr,
    total_ptr,
    scale,
    W,
    kv_heads,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Grid (key heads, SPLITS + 1). Row r of a key head is token r // GROUPS, query head r % GROUPS
    of its group. part [kv_heads, SPLITS + 1, ROWS, D], top and total [.., ROWS]; scale for exp2.
    """
    let_next_start(EARLY)
    head, split = tl.program_id(0), tl.program_id(1)
    cache = head.to(tl.int64) * stride_head
    if EARLY > 1:  # rows of earlier windows; whatever the length is now, these are of the cache
        begin, end = _share(length_ptr, split, SPLITS, BLOCK)
        offs_c = cache + begin * D + tl.arange(0, 1)
        prefetch(keys_ptr, offs_c, offs_c >= 0, (end - begin) * D, 128, EARLY)
        prefetch(values_ptr, offs_c, offs_c >= 0, (end - begin) * D, 128, EARLY)
    wait_for_previous(EARLY)
    length = tl.load(length_ptr).to(tl.int32)
    begin, end = _share(length_ptr, split, SPLITS, BLOCK)
    # Programs without positions leave zeros: nobody has to wait for the length to know of them.
    rows = tl.arange(0, ROWS)
    t, g = rows // GROUPS, rows % GROUPS
    at = t * stride_t + (head * GROUPS + g) * D
    q_lo, q_hi = _load_heads(
        qkv_ptr, stride_p, at[:, None], (t < W)[:, None], q_norm_ptr, eps, cos_ptr, sin_ptr,
        (t * stride_rotary)[:, None], D, HALF, NORM, 1, PARTS, DTYPE,
    )  # fmt: skip
    top = tl.full((ROWS,), -1.0e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    offs_h, offs_d = tl.arange(0, HALF)[:, None], tl.arange(0, BLOCK_D)[None, :]
    half: tl.constexpr = D // 2
    for n0 in range(begin, end, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        k_ptrs = keys_ptr + cache + n[None, :] * D + offs_h
        mask_k = (n[None, :] < end) & (offs_h < half)
        k_lo = tl.load(k_ptrs, mask=mask_k, other=0.0)
        k_hi = tl.load(k_ptrs + half, mask=mask_k, other=0.0)
        mask_v = (n[:, None] < end) & (offs_d < D)
        v = tl.load(values_ptr + cache + n[:, None] * D + offs_d, mask=mask_v, other=0.0)
        top, total, acc = _step(
            q_lo, q_hi, k_lo, k_hi, v, (n < end)[None, :], scale, top, total, acc
        )
    if split == SPLITS:  # the window itself: into the cache, and each token as far as itself
        new = tl.arange(0, TOKENS)
        mine = new * stride_t + (kv_heads * GROUPS + head) * D
        k_lo, k_hi = _load_heads(
            qkv_ptr, stride_p, mine[None, :], (new < W)[None, :], k_norm_ptr, eps, cos_ptr, sin_ptr,
            (new * stride_rotary)[None, :], D, HALF, NORM, 0, PARTS, DTYPE,
        )  # fmt: skip
        mask_v = (new < W)[:, None] & (offs_d < D)
        v_ptrs = qkv_ptr + (mine + kv_heads * D)[:, None] + offs_d
        v = load_parts(v_ptrs, mask_v, stride_p, PARTS, DTYPE)
        place = cache + (length + new) * D
        mask_k = (new < W)[None, :] & (offs_h < half)
        tl.store(keys_ptr + place[None, :] + offs_h, k_lo, mask=mask_k)
        tl.store(keys_ptr + place[None, :] + offs_h + half, k_hi, mask=mask_k)
        tl.store(values_ptr + place[:, None] + offs_d, v, mask=mask_v)
        seen = (new[None, :] <= t[:, None]) & (new < W)[None, :]
        top, total, acc = _step(q_lo, q_hi, k_lo, k_hi, v, seen, scale, top, total, acc)
    row = (head * (SPLITS + 1) + split) * ROWS + rows
    tl.store(top_ptr + row, top)
    tl.store(total_ptr + row, total)
    tl.store(part_ptr + row[:, None] * D + offs_d, acc, mask=(t < W)[:, None] & (offs_d < D))


@triton.jit
def _sum_parts_kernel(
    part_ptr,
    top_ptr,
    total_ptr,
    out_ptr,
    heads,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
    ALL: tl.constexpr,
):
    """out [W, heads, D]: the parts of each row, scaled to a common maximum. Grid (heads, W)."""
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    head, t = tl.program_id(0), tl.program_id(1)
    offs_s, offs_d = tl.arange(0, ALL), tl.arange(0, BLOCK_D)
    used = offs_s <= SPLITS
    row = (head // GROUPS * (SPLITS + 1) + offs_s) * ROWS + t * GROUPS + head % GROUPS
    top = tl.load(top_ptr + row, mask=used, other=float("-inf"))
    scale = tl.exp2(top - tl.max(top, axis=0))
    total = tl.sum(scale * tl.load(total_ptr + row, mask=used, other=0.0), axis=0)
    mask = used[:, None] & (offs_d < D)[None, :]
    part = tl.load(part_ptr + row[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    y = tl.sum(scale[:, None] * part, axis=0) / total
    tl.store(
        out_ptr + (t * heads + head) * D + offs_d, y.to(out_ptr.dtype.element_ty), mask=offs_d < D
    )


def window_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    scale: float,
) -> Tensor:
    """Attention outputs [W, heads * D] of the W <= 16 tokens behind the cache's first `length`.

    qkv [parts, W, (heads + 2 * kv_heads) * D]: the projections, queries first, as `fused_linear`
    leaves them. cos, sin [W, D] of the
    rotary embedding (its halves as in Llama). q_norm, k_norm [D]: RMSNorm of every head, or None.
    keys, values [kv_heads, L, D] get the new rows; length: int64 scalar tensor, not changed.
    Raises ValueError for other shapes.
    """
    kv_heads, room, D = keys.shape
    _, W, width = qkv.shape
    heads = width // D - 2 * kv_heads
    if not 1 <= W <= TOKEN_ROWS or heads < 1 or heads % kv_heads or width % D or D % 2:
        raise ValueError(
            f"qkv: expected [parts, 1..{TOKEN_ROWS}, (heads + 2 * {kv_heads}) * {D}], "
            f"got {list(qkv.shape)}"
        )
    if keys.stride() != values.stride() or keys.stride()[1:] != (D, 1) or cos.shape != (W, D):
        raise ValueError(
            f"keys, values, cos: expected caches [{kv_heads}, L, {D}] in one piece and [{W}, {D}], "
            f"got {list(keys.shape)}, {list(values.shape)} and {list(cos.shape)}"
        )
    groups = heads // kv_heads
    splits = max(1, min(_PROGRAMS // kv_heads - 1, triton.cdiv(room, _BLOCK)))
    rows = max(16, triton.next_power_of_2(W * groups))
    part = torch.empty(kv_heads, splits + 1, rows, D, dtype=torch.float32, device=qkv.device)
    top, total = torch.empty(2, kv_heads, splits + 1, rows, dtype=torch.float32, device=qkv.device)
    out = torch.empty(W, heads * D, dtype=keys.dtype, device=qkv.device)
    shared = {
        "GROUPS": groups,
        "D": D,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "ROWS": rows,
        "SPLITS": splits,
        **pdl_args(qkv.device),
    }
    _window_attention_kernel[(kv_heads, splits + 1)](
        qkv_ptr=qkv,
        stride_t=qkv.stride(1),
        cos_ptr=cos,
        sin_ptr=sin,
        stride_rotary=cos.stride(0),
        q_norm_ptr=qkv if q_norm is None else q_norm,
        k_norm_ptr=qkv if k_norm is None else k_norm,
        eps=eps,
        keys_ptr=keys,
        values_ptr=values,
        stride_head=keys.stride(0),
        length_ptr=length,
        part_ptr=part,
        top_ptr=top,
        total_ptr=total,
        scale=scale * 1.4426950408889634,  # log2(e)
        W=W,
        kv_heads=kv_heads,
        HALF=max(16, triton.next_power_of_2(D // 2)),
        NORM=q_norm is not None,
        TOKENS=TOKEN_ROWS,
        BLOCK=_BLOCK,
        num_warps=8 if rows > 64 else 4,
        **parts_args(qkv, keys.dtype),
        **shared,
    )
    _sum_parts_kernel[(heads, W)](
        part, top, total, out, heads, ALL=triton.next_power_of_2(splits + 1), num_warps=4,
        **shared,
    )  # fmt: skip
    return out
