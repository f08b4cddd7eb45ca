"""Chooses the missing experts of a window that the GPU reads from host memory, in one program.

Few numbers are involved: every expert is compared with every other to find its rank.
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
    BLOCK_E: tl.constexpr,
    CHUNK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    missing_count = tl.zeros((), tl.int32)
    for e0 in range(0, E, BLOCK_E):
        offs = e0 + tl.arange(0, BLOCK_E)
        n = tl.load(counts_ptr + offs, mask=offs < E, other=0)
        absent = tl.load(address_ptr + offs, mask=offs < E, other=1) == 0
        missing_count += tl.sum(((n > 0) & absent).to(tl.int32), axis=0)
    take = tl.load(streams_ptr + missing_count)
    taken = tl.zeros((), tl.int32)
    for e0 in range(0, E, BLOCK_E):
        offs = e0 + tl.arange(0, BLOCK_E)
        n = tl.load(counts_ptr + offs, mask=offs < E, other=0)
        slot = tl.load(address_ptr + offs, mask=offs < E, other=1)
        missing = (n > 0) & (slot == 0)
        rank = tl.zeros((BLOCK_E,), tl.int32)
        for f0 in range(0, E, CHUNK_E):
            other = f0 + tl.arange(0, CHUNK_E)
            m = tl.load(counts_ptr + other, mask=other < E, other=0)
            m = tl.where(tl.load(address_ptr + other, mask=other < E, other=1) == 0, m, 0)
            before = (m[None, :] > n[:, None]) | (
                (m[None, :] == n[:, None]) & (other[None, :] < offs[:, None])
            )
            rank += tl.sum(before.to(tl.int32), axis=1)
        chosen = missing & (rank < take)
        taken += tl.sum(chosen.to(tl.int32), axis=0)
        host = tl.load(host_ptr + offs, mask=chosen, other=0)
        tl.store(where_ptr + offs, tl.where(chosen, host, slot), mask=offs < E)
    tl.store(streamed_ptr, tl.load(streamed_ptr) + taken)
    tl.debug_barrier()  # below, threads read what others have stored
    for p0 in range(0, num_pairs, BLOCK_P):
        offs = p0 + tl.arange(0, BLOCK_P)
        ids = tl.load(ids_ptr + offs, mask=offs < num_pairs, other=-1)
        valid = (ids >= 0) & (ids < E)
        for_cpu = valid & (tl.load(where_ptr + ids, mask=valid, other=1) == 0)
        minus = tl.full((BLOCK_P,), -1, tl.int32)
        tl.store(cpu_ptr + offs, tl.where(for_cpu, ids.to(tl.int32), minus), mask=offs < num_pairs)


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
        BLOCK_E=min(256, triton.next_power_of_2(E)),
        CHUNK_E=64,
        BLOCK_P=min(512, max(16, triton.next_power_of_2(ids.numel()))),
        num_warps=4,
    )
    return where, cpu_ids
