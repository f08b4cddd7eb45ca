"""The matmul tile over quantised rows: the bytes of `spac.quantize`, widened in registers."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from spac.kernels.dot import dot


@triton.jit
def int8_tile(
    a_ptrs,
    mask_m,
    w_ptr,
    offs_w,
    mask_n,
    scale_offset,
    offs_row,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    copy_ptr,
    copying,
    COPY: tl.constexpr,
):
    """`matmul_tile` of int8 rows with one fp32 scale each; arguments as of `quantized_tile`."""
    offs_k = tl.arange(0, BLOCK_K)
    at = offs_w[None, :] + offs_k[:, None]
    w_ptrs = w_ptr.to(tl.pointer_type(tl.int8)) + at
    if COPY:
        copy_ptrs = copy_ptr.to(tl.pointer_type(tl.int8)) + at
        copy_end = tl.where(copying, K, 0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k0
        a = tl.load(a_ptrs + k0, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        q = tl.load(w_ptrs + k0, mask=mask_k[:, None] & mask_n[None, :], other=0)
        acc = dot(a, q.to(a.dtype), acc)
        if COPY:
            tl.store(copy_ptrs + k0, q, mask=mask_n[None, :] & (offs_k < copy_end - k0)[:, None])
    scale_ptrs = (w_ptr.to(tl.pointer_type(tl.int8)) + scale_offset).to(tl.pointer_type(tl.float32))
    scale = tl.load(scale_ptrs + offs_row, mask=mask_n, other=0.0)
    if COPY:
        to = (copy_ptr.to(tl.pointer_type(tl.int8)) + scale_offset).to(tl.pointer_type(tl.float32))
        tl.store(to + offs_row, scale, mask=mask_n & (offs_row < tl.where(copying, 2147483647, 0)))
    return acc * scale[None, :]


@triton.jit
def int4_tile(
    a_ptrs,
    mask_m,
    w_ptr,
    offs_w,
    mask_n,
    scale_offset,
    offs_row,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    copy_ptr,
    copying,
    COPY: tl.constexpr,
):
    """`matmul_tile` of int4 rows: even and odd weights are the halves of each byte."""
    HALF_K: tl.constexpr = BLOCK_K // 2
    offs_k = tl.arange(0, BLOCK_K)
    offs_b = tl.arange(0, HALF_K)
    bytes_ptr = w_ptr.to(tl.pointer_type(tl.uint8))
    at = offs_w[None, :] + offs_b[:, None]
    scales_ptr = (bytes_ptr + scale_offset).to(tl.pointer_type(tl.float16))
    first = offs_row * (K // GROUP)
    if COPY:
        copy_bytes = copy_ptr.to(tl.pointer_type(tl.uint8))
        copy_end = tl.where(copying, K, 0)
        copy_scales = (copy_bytes + scale_offset).to(tl.pointer_type(tl.float16))
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        a = tl.load(a_ptrs + k0, mask=mask_m[:, None] & (offs_k < K - k0)[None, :], other=0.0)
        mask = (offs_b < (K - k0) // 2)[:, None] & mask_n[None, :]
        pairs = tl.load(bytes_ptr + at + k0 // 2, mask=mask, other=0)
        group = first[None, :] + (k0 + 2 * offs_b[:, None]) // GROUP
        scale = tl.load(scales_ptr + group, mask=mask, other=0.0)
        wide = scale.to(tl.float32)
        even = ((pairs & 15).to(tl.float32) - 8) * wide
        odd = ((pairs >> 4).to(tl.float32) - 8) * wide
        a_even, a_odd = tl.split(tl.reshape(a, (BLOCK_M, HALF_K, 2)))
        acc = dot(a_even, even.to(a.dtype), acc)
        acc = dot(a_odd, odd.to(a.dtype), acc)
        if COPY:
            mask = (offs_b < (copy_end - k0) // 2)[:, None] & mask_n[None, :]
            tl.store(copy_bytes + at + k0 // 2, pairs, mask=mask)
            tl.store(copy_scales + group, scale, mask=mask)
    return acc


@triton.jit
def quantized_tile(
    a_ptrs,
    mask_m,
    w_ptr,
    offs_w,
    mask_n,
    scale_offset,
    offs_row,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    copy_ptr,
    copying,
    COPY: tl.constexpr,
):
    """fp32 [BLOCK_M, BLOCK_N] = a @ w.T as `matmul_tile`, w in the form that GROUP names.

    GROUP: weights that share a scale in int4, or 1 for int8 rows. The rows of w begin `offs_w`
    bytes behind w_ptr, and the scales of its row `offs_row` lie `scale_offset` bytes behind w_ptr
    in the order of the rows. With COPY and if `copying`, what is read is stored behind copy_ptr.
    """
    if GROUP == 1:
        return int8_tile(
            a_ptrs, mask_m, w_ptr, offs_w, mask_n, scale_offset, offs_row, K,
            BLOCK_M, BLOCK_N, BLOCK_K, copy_ptr, copying, COPY,
        )  # fmt: skip
    else:
        return int4_tile(
            a_ptrs, mask_m, w_ptr, offs_w, mask_n, scale_offset, offs_row, K,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP, copy_ptr, copying, COPY,
        )  # fmt: skip


def quantized_args(table: Any, name: str) -> dict[str, int]:
    """Keyword arguments of the kernels that read the rows `name` ("gate_up" or "down")."""
    layout = table.layout
    if layout.form == "float":
        return {"scale_offset": 0, "GROUP": 0}
    group = layout.group if layout.form == "int4" else 1
    if name == "gate_up":
        return {"scale_offset": table.gate_up_scale_offset, "GROUP": group}
    return {"scale_offset": table.down_scale_offset - table.down_offset, "GROUP": group}
