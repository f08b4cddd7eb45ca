"""Hands a layer's window to the CPU and waits for the answer, by flags in pinned host memory.

Nothing here synchronises with the host program, so that a CUDA graph can hold it. The host tensors
are page-locked and reached over PCIe. Launches follow each other on one stream: what the first one
wrote is visible to the CPU before the second one rings.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spac.kernels.flag import LONGEST, wait_for

_BLOCK = 1024


@triton.jit
def _send_kernel(
    hidden_ptr,
    ids_ptr,
    weights_ptr,
    host_hidden_ptr,
    host_ids_ptr,
    host_weights_ptr,
    num_hidden,
    num_pairs,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_hidden
    tl.store(host_hidden_ptr + offs, tl.load(hidden_ptr + offs, mask=mask), mask=mask)
    mask = offs < num_pairs
    tl.store(host_ids_ptr + offs, tl.load(ids_ptr + offs, mask=mask), mask=mask)
    tl.store(host_weights_ptr + offs, tl.load(weights_ptr + offs, mask=mask), mask=mask)


@triton.jit
def _ring_kernel(bell_ptr, window_ptr, layer):
    tl.store(bell_ptr + layer, tl.load(window_ptr))


@triton.jit
def _join_kernel(
    partial_ptr,
    rest_ptr,
    y_ptr,
    n,
    done_ptr,
    failed_ptr,
    window_ptr,
    seen_ptr,
    waited_ptr,
    layer,
    longest,
    BLOCK: tl.constexpr,
):
    """The first program waits for the CPU, the others for what it says behind `seen_ptr`."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    total = tl.load(partial_ptr + offs, mask=mask)
    window = tl.load(window_ptr)
    if tl.program_id(0) == 0:
        waited = wait_for(done_ptr + layer, window, failed_ptr, longest)
        tl.store(waited_ptr + layer, waited)
        tl.debug_barrier()
        tl.atomic_xchg(seen_ptr + layer, window, sem="release")
    else:
        seen = tl.load(seen_ptr + layer, volatile=True)
        while seen < window:
            seen = tl.load(seen_ptr + layer, volatile=True)
    tl.debug_barrier()  # no thread reads what the CPU wrote before all have seen that it did
    total += tl.load(rest_ptr + offs, mask=mask, volatile=True)
    tl.store(y_ptr + offs, total.to(y_ptr.dtype.element_ty), mask=mask)


def send(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    host: tuple[Tensor, Tensor, Tensor],
    bell: Tensor,
    window: Tensor,
    layer: int,
) -> None:
    """Write hidden [T, H], ids int32 and weights fp32 [T, k] to `host`; bell[layer] = window."""
    hidden, ids, weights = hidden.contiguous(), ids.contiguous(), weights.contiguous()
    grid = (triton.cdiv(max(hidden.numel(), ids.numel()), _BLOCK),)
    _send_kernel[grid](
        hidden, ids, weights, *host, hidden.numel(), ids.numel(), BLOCK=_BLOCK, num_warps=4
    )
    _ring_kernel[(1,)](bell, window, layer, num_warps=1)


def join(
    partial: Tensor,
    rest: Tensor,
    dtype: torch.dtype,
    done: Tensor,
    failed: Tensor,
    window: Tensor,
    seen: Tensor,
    waited: Tensor,
    layer: int,
    longest: int = LONGEST,
) -> Tensor:
    """partial + rest in `dtype`, fp32 [T, H] each, rest in host memory once done[layer] >= window.

    A wait of more than `longest` microseconds sets `failed` and goes on. On the device: seen int32
    [L], the last window of each layer; waited int32 [L], microseconds. The interpreter counts
    looks.
    """
    y = torch.empty(partial.shape, dtype=dtype, device=partial.device)
    n = y.numel()
    _join_kernel[(triton.cdiv(n, _BLOCK),)](
        partial.contiguous(), rest, y, n, done, failed, window, seen, waited, layer, longest,
        BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return y
