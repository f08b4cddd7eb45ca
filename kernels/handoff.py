"""Hands a layer's window to the CPU and waits for the answer, by flags in pinned host memory.

Nothing here synchronises with the host program, so that a CUDA graph can hold it. The host tensors
are page-locked and reached over PCIe. Rows and bell are one launch: each program makes what it
wrote visible to the CPU before it says that it has arrived, and the last one to arrive rings. Of a
layer whose experts are all on the GPU no rows are sent and no answer is awaited.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spac.kernels.dot import INTERPRET
from spac.kernels.flag import LONGEST, wait_for

_BLOCK = 1024
_SEND_BLOCK = 4096  # numbers of hidden rows: one token is often one program's work
_ORDERED = tl.constexpr(not INTERPRET)  # the interpreter's programs follow each other


@triton.jit
def _fence():
    """Thread 0: what the program stored before its last barrier comes before what follows, for the
    CPU as well."""
    if _ORDERED:
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            mov.u32 $0, %tid.x;
            setp.eq.u32 p, $0, 0;
            @p fence.acq_rel.sys;
            }""",
            "=r", [], tl.int32, False, 1,
        )  # fmt: skip


@triton.jit
def _store_behind(ptr, value):
    """Thread 0: `_fence`, then ptr[0] = value."""
    if _ORDERED:
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            mov.u32 $0, %tid.x;
            setp.eq.u32 p, $0, 0;
            @p st.release.sys.global.u32 [$1], $2;
            }""",
            "=r,l,r", [ptr, value], tl.int32, False, 1,
        )  # fmt: skip
    else:
        tl.store(ptr, value)


@triton.jit
def _send_kernel(
    hidden_ptr,
    ids_ptr,
    weights_ptr,
    host_hidden_ptr,
    host_ids_ptr,
    host_weights_ptr,
    bell_ptr,
    window_ptr,
    arrived_ptr,
    num_hidden,
    num_pairs,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Grid (blocks of hidden,). All loads come first: behind a store, which might concern them,
    each would be waited for by itself."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    offs, offs_p = pid * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_P)
    mask, mask_p = offs < num_hidden, offs_p < num_pairs
    hidden = tl.load(hidden_ptr + offs, mask=mask)
    ids = tl.load(ids_ptr + offs_p, mask=mask_p, other=-1)
    weights = tl.load(weights_ptr + offs_p, mask=mask_p)
    window = tl.load(window_ptr)
    some = tl.max(ids, axis=0) >= 0
    mask, mask_p = mask & some, mask_p & some & (pid == 0)
    tl.store(host_hidden_ptr + offs, hidden, mask=mask)
    tl.store(host_ids_ptr + offs_p, ids, mask=mask_p)
    tl.store(host_weights_ptr + offs_p, weights, mask=mask_p)
    tl.debug_barrier()  # every thread has stored before one of them says so
    before = 0
    if programs > 1:
        _fence()
        before = tl.atomic_add(arrived_ptr, 1, sem="acq_rel")
    if before == programs - 1:
        _store_behind(bell_ptr, 2 * window + some.to(tl.int32))
        tl.store(arrived_ptr, 0)


@triton.jit
def _join_kernel(
    partial_ptr,
    rest_ptr,
    ids_ptr,
    y_ptr,
    n,
    num_pairs,
    done_ptr,
    failed_ptr,
    window_ptr,
    seen_ptr,
    waited_ptr,
    layer,
    longest,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The first program waits for the CPU, the others for what it says behind `seen_ptr`."""
    pid, offs_p = tl.program_id(0), tl.arange(0, BLOCK_P)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    total = tl.load(partial_ptr + offs, mask=mask)
    ids = tl.load(ids_ptr + offs_p, mask=offs_p < num_pairs, other=-1)
    window = tl.load(window_ptr)
    waited = 0
    if tl.max(ids, axis=0) >= 0:
        if pid == 0:
            waited = wait_for(done_ptr + layer, window, failed_ptr, longest)
            tl.debug_barrier()
            tl.atomic_xchg(seen_ptr + layer, window, sem="release")
        else:
            seen = tl.load(seen_ptr + layer, volatile=True)
            while seen < window:
                seen = tl.load(seen_ptr + layer, volatile=True)
        tl.debug_barrier()  # no thread reads what the CPU wrote before all have seen that it did
        total += tl.load(rest_ptr + offs, mask=mask, volatile=True)
    if pid == 0:
        tl.store(waited_ptr + layer, waited)
    tl.store(y_ptr + offs, total.to(y_ptr.dtype.element_ty), mask=mask)


def send(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    host: tuple[Tensor, Tensor, Tensor],
    bell: Tensor,
    window: Tensor,
    arrived: Tensor,
    layer: int,
) -> None:
    """Write hidden [T, H], ids int32 and weights fp32 [T, k] to `host`, then bell[layer] =
    2 * window + 1; if all ids are -1, only bell[layer] = 2 * window. arrived int32 [1], on the
    device, is 0 before and after.
    """
    hidden, ids, weights = hidden.contiguous(), ids.contiguous(), weights.contiguous()
    _send_kernel[(triton.cdiv(hidden.numel(), _SEND_BLOCK),)](
        hidden, ids, weights, *host, bell[layer:], window, arrived, hidden.numel(), ids.numel(),
        BLOCK=_SEND_BLOCK, BLOCK_P=triton.next_power_of_2(ids.numel()), num_warps=8,
    )  # fmt: skip


def join(
    partial: Tensor,
    rest: Tensor,
    ids: Tensor,
    dtype: torch.dtype,
    done: Tensor,
    failed: Tensor,
    window: Tensor,
    seen: Tensor,
    waited: Tensor,
    layer: int,
    longest: int = LONGEST,
) -> Tensor:
    """partial + rest in `dtype`, fp32 [T, H] each, rest in host memory once done[layer] >= window;
    partial alone, at once, if all ids int32 [T, k] are -1.

    A wait of more than `longest` microseconds sets `failed` and goes on. On the device: seen int32
    [L], the last window of each layer; waited int32 [L], microseconds. The interpreter counts
    looks.
    """
    y = torch.empty(partial.shape, dtype=dtype, device=partial.device)
    n = y.numel()
    _join_kernel[(triton.cdiv(n, _BLOCK),)](
        partial.contiguous(), rest, ids.contiguous(), y, n, ids.numel(), done, failed, window, seen,
        waited, layer, longest, BLOCK=_BLOCK, BLOCK_P=triton.next_power_of_2(ids.numel()),
        num_warps=4,
    )  # fmt: skip
    return y
