"""y = sum of the partial results of the sides that computed a layer, in list order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _combine_kernel(a_ptr, b_ptr, y_ptr, n, PAIR: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    total = tl.load(a_ptr + offs, mask=mask).to(tl.float32)
    if PAIR:
        total += tl.load(b_ptr + offs, mask=mask).to(tl.float32)
    tl.store(y_ptr + offs, total.to(y_ptr.dtype.element_ty), mask=mask)


def _add(a: Tensor, b: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = torch.empty(a.shape, dtype=dtype, device=a.device)
    block = 1024
    if y.numel():
        _combine_kernel[(triton.cdiv(y.numel(), block),)](
            a, a if b is None else b, y, y.numel(), PAIR=b is not None, BLOCK=block, num_warps=4
        )
    return y


def combine(partials: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Sum in fp32 of float tensors of one shape, in list order, cast once to `dtype`."""
    if not partials or any(p.shape != partials[0].shape for p in partials):
        shapes = [list(p.shape) for p in partials]
        raise ValueError(f"partials: expected at least one, all of one shape, got {shapes}")
    first, *rest = [p.contiguous() for p in partials]
    for p in rest[:-1]:
        first = _add(first, p, torch.float32)
    return _add(first, rest[-1] if rest else None, dtype)
