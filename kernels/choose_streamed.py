"""Chooses the missing experts of a window that the GPU reads from host memory, in one program.

Few numbers are involved, so that waiting for memory is what takes time: everything is loaded at
once, and every expert is compared with every other to find its rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _choose_streamed_kernel(
    ids_ptr,
    counts_ptr,
    address_ptr,
    host_ptr,
    streams_ptr,
    streamed_ptr,
    where_ptr,
    cpu_ptr,
    num_pairs,
    E,
    EXPERTS: tl.constexpr,
    CHUNK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    offs = tl.arange(0, EXPERTS)
    mask = offs < E
    n = tl.load(counts_ptr + offs, mask=mask, other=0)
    slot = tl.load(address_ptr + offs, mask=mask, other=1)
    host = tl.load(host_ptr + offs, mask=mask, other=0)
    streams = tl.load(streams_ptr + offs, mask=mask, other=0)
    all_missing = tl.load(streams_ptr + E)
    missing = (n > 0) & (slot == 0)
    count = tl.sum(missing.to(tl.int32), axis=0)
    take = tl.where(count == E, all_missing, tl.sum(tl.where(offs == count, streams, 0), axis=0))
    rank = tl.zeros((EXPERTS,), tl.int32)
    for f0 in range(0, EXPERTS, CHUNK_E):
        other = f0 + tl.arange(0, CHUNK_E)
        m = tl.load(counts_ptr + other, mask=other < E, other=0)
        m = tl.where(tl.load(address_ptr + other, mask=other < E, other=1) == 0, m, 0)
        before = (m[None, :] > n[:, None]) | (
            (m[None, :] == n[:, None]) & (other[None, :] < offs[:, None])
        )
        rank += tl.sum(before.to(tl.int32), axis=1)
    chosen = missing & (rank < take)
    tl.store(where_ptr + offs, tl.where(chosen, host, slot), mask=mask)
    tl.store(streamed_ptr, tl.load(streamed_ptr) + tl.sum(chosen.to(tl.int32), axis=0))
    left = tl.where(missing & (rank >= take), offs, -2)  # the CPU's, -2 is nobody's
    for p0 in range(0, num_pairs, BLOCK_P):
        offs_p = p0 + tl.arange(0, BLOCK_P)
        ids = tl.load(ids_ptr + offs_p, mask=offs_p < num_pairs, other=-1).to(tl.int32)
        mine = tl.max((ids[:, None] == left[None, :]).to(tl.int32), axis=1)
        minus = tl.full((BLOCK_P,), -1, tl.int32)
        tl.store(cpu_ptr + offs_p, tl.where(mine > 0, ids, minus), mask=offs_p < num_pairs)


def choose_streamed(
    ids: Tensor, counts: Tensor, address: Tensor, host: Tensor, streams: Tensor, streamed: Tensor
) -> tuple[Tensor, Tensor]:
    """As `spac.reference.choose_streamed`; every tensor but ids contiguous."""
    E = address.numel()
    for name, tensor, dtype, size in (
        ("counts", counts, torch.int32, E),
        ("address", address, torch.int64, E),
        ("host", host, torch.int64, E),
        ("streams", streams, torch.int32, E + 1),
        ("streamed", streamed, torch.int64, 1),
    ):
        if tensor.dtype != dtype or tensor.numel() != size or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous {dtype} [{size}], "
                f"got {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
            )
    ids = ids.contiguous()
    where = torch.empty_like(address)
    cpu_ids = torch.empty(ids.shape, dtype=torch.int32, device=ids.device)
    experts = triton.next_power_of_2(E)
    _choose_streamed_kernel[(1,)](
        ids,
        counts,
        address,
        host,
        streams,
        streamed,
        where,
        cpu_ids,
        ids.numel(),
        E,
        EXPERTS=experts,
        CHUNK_E=min(experts, max(1, (1 << 14) // experts)),  # comparisons at a time
        BLOCK_P=min(triton.next_power_of_2(ids.numel()), max(1, (1 << 13) // experts)),
        num_warps=8,
    )
    return where, cpu_ids
