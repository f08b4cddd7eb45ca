"""The products of `kernels/grouped.py` on Hopper, with descriptors for weights and sorted rows.

For tables whose addresses are slots of one memory (`ExpertTable.slots`): a descriptor names a slot
by its number. Rows of x are gathered by pointers, which costs nothing beside the weights.

A tile of 128 + 16 rows has a second, small matmul beside the first: an expert with a little more
than 128 n rows needs no further tile, which would read all of its weights once more.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from spac.kernels.common import activate
from spac.kernels.config import Tile, device_of
from spac.kernels.dot import dot
from spac.kernels.plan import Plan


@triton.jit
def _place(t, blocks_n, GROUP_M: tl.constexpr):
    """Tile and block of columns of the t-th piece of work; GROUP_M tiles in turn share weights."""
    group = t // (GROUP_M * blocks_n)
    rest = t - group * (GROUP_M * blocks_n)
    block = rest // GROUP_M
    return group * GROUP_M + rest - block * GROUP_M, block


@triton.jit
def _tile_at(t, blocks_n, tiles, tile_row_ptr, tile_rows_ptr, tile_slot_ptr, GROUP_M: tl.constexpr):
    """First row, number of rows and slot of the t-th piece of work; the last tile is unused."""
    tile, _ = _place(t, blocks_n, GROUP_M)
    tile = tl.minimum(tile, tiles - 1)
    return (
        tl.load(tile_row_ptr + tile),
        tl.load(tile_rows_ptr + tile),
        tl.load(tile_slot_ptr + tile),
    )


@triton.jit
def _row_pointers(
    x, stride_xt, order_ptr, row0, used, offs_m, K: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Rows beyond the tile's last repeat that: the loads need no mask."""
    some = tl.minimum(offs_m, used - 1)
    pairs = tl.load(order_ptr + row0 + some, mask=some >= 0, other=0)
    return x + (pairs // K).to(tl.int64)[:, None] * stride_xt + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def _store_hidden(
    acc,
    row0,
    offs_m,
    used,
    n0,
    h_ptr,
    pre_ptr,
    alpha,
    limit,
    inter,
    ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    if INTERLEAVED:
        gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N, 2)))
    else:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
    rows = (row0 + offs_m).to(tl.int64)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    mask = (offs_m < used)[:, None] & (offs_n < inter)[None, :]
    if SAVE:
        columns = offs_n * (2 if INTERLEAVED else 1)
        pre_ptrs = pre_ptr + rows[:, None] * (2 * inter) + columns[None, :]
        tl.store(pre_ptrs, gate.to(pre_ptr.dtype.element_ty), mask=mask)
        pre_ptrs += 1 if INTERLEAVED else inter
        tl.store(pre_ptrs, up.to(pre_ptr.dtype.element_ty), mask=mask)
    h = activate(gate, up, alpha, limit, ACTIVATION)
    h_ptrs = h_ptr + rows[:, None] * inter + offs_n[None, :]
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gate_up_tile(
    row0,
    used,
    slot,
    n0,
    x,
    stride_xt,
    w_desc,
    h_ptr,
    pre_ptr,
    order_ptr,
    alpha,
    limit,
    H,
    inter,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    w0 = 2 * n0 if INTERLEAVED else n0
    offs_m = tl.arange(0, BLOCK_M)
    x_ptrs = _row_pointers(x, stride_xt, order_ptr, row0, used, offs_m, K, BLOCK_K)
    acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
    if EXTRA:
        offs_e = BLOCK_M + tl.arange(0, EXTRA)
        extra_ptrs = _row_pointers(x, stride_xt, order_ptr, row0, used, offs_e, K, BLOCK_K)
        acc_e = tl.zeros((EXTRA, 2 * BLOCK_N), tl.float32)
    tl.assume(H > 0)  # without it ptxas lets each matmul wait for the one before
    for k0 in range(0, H, BLOCK_K):
        a = tl.load(x_ptrs)
        w = w_desc.load([slot, 0, w0, k0]).reshape(2 * BLOCK_N, BLOCK_K).T
        acc = dot(a, w, acc)
        x_ptrs += BLOCK_K
        if EXTRA:
            acc_e = dot(tl.load(extra_ptrs), w, acc_e)
            extra_ptrs += BLOCK_K
    _store_hidden(
        acc, row0, offs_m, used, n0, h_ptr, pre_ptr, alpha, limit, inter,
        ACTIVATION, INTERLEAVED, SAVE, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if EXTRA:
        _store_hidden(
            acc_e, row0, offs_e, used, n0, h_ptr, pre_ptr, alpha, limit, inter,
            ACTIVATION, INTERLEAVED, SAVE, EXTRA, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tiles"])
def _gate_up_tile_kernel(
    x,
    stride_xt,
    w_desc,
    h_ptr,
    pre_ptr,
    order_ptr,
    tile_row_ptr,
    tile_rows_ptr,
    tile_slot_ptr,
    used_ptr,
    tiles,
    blocks_n,
    alpha,
    limit,
    H,
    inter,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SMALL_M: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    t = tl.program_id(0)
    _, block = _place(t, blocks_n, GROUP_M)
    row0, used, slot = _tile_at(
        t, blocks_n, tiles, tile_row_ptr, tile_rows_ptr, tile_slot_ptr, GROUP_M
    )
    if used <= 0:
        return
    if used <= SMALL_M:
        _gate_up_tile(
            row0, used, slot, block * BLOCK_N, x, stride_xt, w_desc, h_ptr, pre_ptr, order_ptr,
            alpha, limit, H, inter, K, ACTIVATION, INTERLEAVED, SAVE, SMALL_M, 0, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif SMALL_M < BLOCK_M:
        _gate_up_tile(
            row0, used, slot, block * BLOCK_N, x, stride_xt, w_desc, h_ptr, pre_ptr, order_ptr,
            alpha, limit, H, inter, K, ACTIVATION, INTERLEAVED, SAVE, BLOCK_M, 0, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tiles"])
def _gate_up_flat_kernel(
    x,
    stride_xt,
    w_desc,
    h_ptr,
    pre_ptr,
    order_ptr,
    tile_row_ptr,
    tile_rows_ptr,
    tile_slot_ptr,
    used_ptr,
    tiles,
    blocks_n,
    alpha,
    limit,
    H,
    inter,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EXTRA: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One loop over the steps of all tiles of a program: the loads of the next tile are under way
    while this one's result is stored. A tile's place is read one tile before."""
    total = tl.cdiv(tl.load(used_ptr), GROUP_M) * GROUP_M * blocks_n
    start, step = tl.program_id(0), tl.num_programs(0)
    row1, used1, slot1 = _tile_at(
        start, blocks_n, tiles, tile_row_ptr, tile_rows_ptr, tile_slot_ptr, GROUP_M
    )
    for t in tl.range(start, total, step, flatten=True):
        _, block = _place(t, blocks_n, GROUP_M)
        row0, used, slot = row1, used1, slot1
        row1, used1, slot1 = _tile_at(
            t + step, blocks_n, tiles, tile_row_ptr, tile_rows_ptr, tile_slot_ptr, GROUP_M
        )
        _gate_up_tile(
            row0, used, slot, block * BLOCK_N, x, stride_xt, w_desc, h_ptr, pre_ptr, order_ptr,
            alpha, limit, H, inter, K, ACTIVATION, INTERLEAVED, SAVE, BLOCK_M, EXTRA,
            BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _store_rows(
    acc,
    row0,
    offs_m,
    used,
    n0,
    out_ptr,
    weights_ptr,
    order_ptr,
    N,
    WEIGHTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    mask_m = offs_m < used
    pairs = tl.load(order_ptr + row0 + offs_m, mask=mask_m, other=0).to(tl.int64)
    if WEIGHTED:
        weight = tl.load(weights_ptr + pairs, mask=mask_m, other=0.0).to(tl.float32)
        acc = weight[:, None] * acc
    offs_n = n0 + tl.arange(0, BLOCK_N)
    out_ptrs = out_ptr + pairs[:, None] * N + offs_n[None, :]
    mask = mask_m[:, None] & (offs_n < N)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rows_tile(
    row0,
    used,
    slot,
    n0,
    a_desc,
    extra_desc,
    w_desc,
    out_ptr,
    weights_ptr,
    order_ptr,
    N,
    depth,
    WEIGHTED: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if EXTRA:
        acc_e = tl.zeros((EXTRA, BLOCK_N), tl.float32)
    tl.assume(depth > 0)
    for k0 in range(0, depth, BLOCK_K):
        a = a_desc.load([row0, k0])  # rows beyond the tile's are another expert's: not stored
        if TURNED:
            w = w_desc.load([slot, k0, n0]).reshape(BLOCK_K, BLOCK_N)
        else:
            w = w_desc.load([slot, n0, k0]).reshape(BLOCK_N, BLOCK_K).T
        acc = dot(a, w, acc)
        if EXTRA:
            acc_e = dot(extra_desc.load([row0 + BLOCK_M, k0]), w, acc_e)
    offs_m = tl.arange(0, BLOCK_M)
    _store_rows(acc, row0, offs_m, used, n0, out_ptr, weights_ptr, order_ptr, N, WEIGHTED, BLOCK_N)
    if EXTRA:
        offs_e = BLOCK_M + tl.arange(0, EXTRA)
        _store_rows(
            acc_e, row0, offs_e, used, n0, out_ptr, weights_ptr, order_ptr, N, WEIGHTED, BLOCK_N
        )


@triton.jit(do_not_specialize=["tiles"])
def _rows_tile_kernel(
    a_desc,
    small_desc,
    w_desc,
    out_ptr,
    weights_ptr,
    order_ptr,
    tile_row_ptr,
    tile_rows_ptr,
    tile_slot_ptr,
    used_ptr,
    tiles,
    blocks_n,
    N,
    depth,
    WEIGHTED: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SMALL_M: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    t = tl.program_id(0)
    _, block = _place(t, blocks_n, GROUP_M)
    row0, used, slot = _tile_at(
        t, blocks_n, tiles, tile_row_ptr, tile_rows_ptr, tile_slot_ptr, GROUP_M
    )
    if used <= 0:
        return
    if used <= SMALL_M:
        _rows_tile(
            row0, used, slot, block * BLOCK_N, small_desc, small_desc, w_desc, out_ptr,
            weights_ptr, order_ptr, N, depth, WEIGHTED, TURNED, SMALL_M, 0, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif SMALL_M < BLOCK_M:
        _rows_tile(
            row0, used, slot, block * BLOCK_N, a_desc, small_desc, w_desc, out_ptr,
            weights_ptr, order_ptr, N, depth, WEIGHTED, TURNED, BLOCK_M, 0, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tiles"])
def _rows_flat_kernel(
    a_desc,
    extra_desc,
    w_desc,
    out_ptr,
    weights_ptr,
    order_ptr,
    tile_row_ptr,
    tile_rows_ptr,
    tile_slot_ptr,
    used_ptr,
    tiles,
    blocks_n,
    N,
    depth,
    WEIGHTED: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EXTRA: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As `_gate_up_flat_kernel`."""
    total = tl.cdiv(tl.load(used_ptr), GROUP_M) * GROUP_M * blocks_n
    start, step = tl.program_id(0), tl.num_programs(0)
    row1, used1, slot1 = _tile_at(
        start, blocks_n, tiles, tile_row_ptr, tile_rows_ptr, tile_slot_ptr, GROUP_M
    )
    for t in tl.range(start, total, step, flatten=True):
        _, block = _place(t, blocks_n, GROUP_M)
        row0, used, slot = row1, used1, slot1
        row1, used1, slot1 = _tile_at(
            t + step, blocks_n, tiles, tile_row_ptr, tile_rows_ptr, tile_slot_ptr, GROUP_M
        )
        _rows_tile(
            row0, used, slot, block * BLOCK_N, a_desc, extra_desc, w_desc, out_ptr, weights_ptr,
            order_ptr, N, depth, WEIGHTED, TURNED, BLOCK_M, EXTRA, BLOCK_N, BLOCK_K,
        )  # fmt: skip


def has_descriptors(table: Any, block_k: int = 64) -> bool:
    """Whether the weights of `table` can come through descriptors, in steps of `block_k`."""
    layout, slots = table.layout, table.slots
    if slots is None or slots.address is not table.address or table.copy_to is not None:
        return False
    if layout.transposed or layout.bias or layout.dtype == torch.float32:
        return False
    return layout.hidden % block_k == 0 and all(
        w.stride(2) == 1 and not any(s % 8 for s in w.stride()[:2]) and w.data_ptr() % 16 == 0
        for w in (slots.gate_up, slots.down)
    )


def split_height(block_m: int) -> tuple[int, int]:
    """144 = 128 + 16 rows: those of one matmul and of a small one beside it."""
    main = 1 << (block_m.bit_length() - 1)
    return main, block_m - main


def _programs(work: int, tile: Tile, mode: str, x: Tensor) -> int:
    return work if mode == "tile" else min(work, device_of(x.device).processors)


def gate_up_tma(
    x: Tensor,
    plan: Plan,
    table: Any,
    tile: Tile,
    h: Tensor,
    pre: Tensor | None = None,
    mode: str = "flat",
    small_m: int = 64,
    group_m: int = 1,
) -> None:
    """Fills h [P, I] and, if given, pre [P, 2I], as `grouped_gate_up`."""
    layout, w = table.layout, table.slots.gate_up
    H, inter = layout.hidden, layout.intermediate
    n, k = tile.block_n, tile.block_k
    m, extra = split_height(plan.block_m)
    parts = 1 if layout.interleaved else 2
    step = w.stride(1)
    w_desc = TensorDescriptor(
        w,
        [w.shape[0], parts, 2 * inter // parts, H],
        [w.stride(0), inter * step, step, 1],
        [1, parts, 2 * n // parts, k],
    )
    blocks_n = triton.cdiv(inter, n)
    tiles = triton.cdiv(plan.tiles, group_m) * group_m
    kernel: Any = _gate_up_tile_kernel
    rows = {"SMALL_M": min(small_m, m)}
    if not has_descriptors(table, tile.block_k):
        raise ValueError("config: this table cannot be read through descriptors")
    if mode == "flat":
        kernel, rows = _gate_up_flat_kernel, {"EXTRA": extra}
    kernel[(_programs(tiles * blocks_n, tile, mode, x),)](
        x,
        x.stride(0),
        w_desc,
        h,
        h if pre is None else pre,
        plan.order,
        plan.tile_row,
        plan.tile_rows,
        plan.tile_slot,
        plan.used,
        tiles=plan.tiles,
        blocks_n=blocks_n,
        alpha=layout.alpha,
        limit=layout.limit,
        H=H,
        inter=inter,
        K=plan.top_k,
        ACTIVATION=layout.activation,
        INTERLEAVED=layout.interleaved,
        SAVE=pre is not None,
        GROUP_M=group_m,
        **rows,
        **(tile.launch() | {"BLOCK_M": m}),
    )


def rows_tma(
    a: Tensor,
    weights: Tensor | None,
    plan: Plan,
    w: Tensor,
    tile: Tile,
    out: Tensor,
    turned: bool = False,
    mode: str = "flat",
    small_m: int = 64,
    group_m: int = 1,
) -> None:
    """out[pair(r)] = weight[pair(r)] * a[r] @ w_e.T, or @ w_e if `turned`; w of table.slots."""
    n, k = tile.block_n, tile.block_k
    m, extra = split_height(plan.block_m)
    depth, N = a.shape[1], out.shape[1]
    small_m = min(small_m, m)
    blocks_n = triton.cdiv(N, n)
    tiles = triton.cdiv(plan.tiles, group_m) * group_m
    kernel: Any = _rows_tile_kernel
    rows = {"SMALL_M": small_m}
    if mode == "flat":
        kernel, rows = _rows_flat_kernel, {"EXTRA": extra}
    kernel[(_programs(tiles * blocks_n, tile, mode, a),)](
        TensorDescriptor.from_tensor(a, [m, k]),
        TensorDescriptor.from_tensor(a, [extra or small_m, k]),
        TensorDescriptor(w, [*w.shape], [*w.stride()], [1, k, n] if turned else [1, n, k]),
        out,
        out if weights is None else weights,
        plan.order,
        plan.tile_row,
        plan.tile_rows,
        plan.tile_slot,
        plan.used,
        tiles=plan.tiles,
        blocks_n=blocks_n,
        N=N,
        depth=depth,
        WEIGHTED=weights is not None,
        TURNED=turned,
        GROUP_M=group_m,
        **rows,
        **(tile.launch() | {"BLOCK_M": m}),
    )
