"""Measures a `CostModel` with the operators that the engine runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from spac import ops
from spac.cost import CostModel, fit
from spac.layout import ExpertLayout, ExpertTable

# (experts, tokens each): few tokens read weights, many compute; both have to be seen to tell the
# coefficients apart.
_POINTS = ((1, 1), (4, 1), (16, 1), (4, 4), (16, 2), (8, 8))
_POOL_BYTES = 640 << 20  # rotated over, so that no cache holds an expert from one call to the next


def measure_costs(
    layout: ExpertLayout, device: torch.device | str, limit_s: float = 10.0, name: str = ""
) -> CostModel:
    """Seconds of GPU FFN, CPU FFN, copies, and the GPU FFN over experts in host memory, for experts
    of `layout`; about `limit_s` seconds.

    On device "cpu" the GPU side is the CPU operator and copies are memory copies: useful to run
    the whole engine without a GPU, meaningless as a prediction of one. Dense layers are not
    measured (the engine observes them). Medians; weights are rotated past the caches.
    """
    device = torch.device(device)
    blob = layout.blob_bytes
    count = max(min(layout.num_experts, _POOL_BYTES // blob), min(16, layout.num_experts))
    host = torch.empty(count * blob // layout.dtype.itemsize, dtype=layout.dtype)
    if device.type == "cuda":
        host = host.pin_memory()
    host.fill_(1e-2)
    pool = host.to(device) if device.type == "cuda" else host.clone()
    budget = limit_s / (4 * len(_POINTS))
    sides = {
        side: _ffn_seconds(layout, weights, count, budget, weights.device)
        for side, weights in (("gpu", pool), ("cpu", host))
    }
    stream_byte = 0.0
    if device.type == "cuda":
        stream_byte = _ffn_seconds(layout, host, count, budget, device)[1] / blob
    flat_host, flat_pool = host.view(torch.uint8), pool.view(torch.uint8)
    rows, seconds = [], []
    for size, copies in ((blob // 8, 1), (blob, 1), (blob, 4)):
        rows.append((copies, copies * size))
        seconds.append(_copy_seconds(flat_host, flat_pool, size, copies, budget))
    latency, byte = fit(rows, seconds)
    return CostModel(
        blob,
        *sides["gpu"],
        *sides["cpu"],
        float(latency),
        float(byte),
        stream_byte=min(stream_byte, 1e-3),
        name=name or str(device),
    )


def _ffn_seconds(
    layout: ExpertLayout, weights: Tensor, count: int, budget: float, device: torch.device
) -> tuple[float, float, float]:
    """(launch, expert, pair) of the FFN on `device` over `count` blobs in `weights`."""
    rows, seconds = [], []
    address = torch.zeros(layout.num_experts, dtype=torch.int64, device=device)
    address[:count] = weights.data_ptr() + layout.blob_bytes * torch.arange(count, device=device)
    table = ExpertTable.from_blobs(layout, address, weights)
    for experts, tokens in _POINTS:
        experts = min(experts, count)
        x = torch.full((tokens, layout.hidden), 0.01, dtype=layout.dtype, device=device)
        gates = torch.full((tokens, experts), 1 / experts, device=device)
        starts = range(0, max(count - experts, 0) + 1, experts)
        ids = [
            torch.arange(s, s + experts, dtype=torch.int32, device=device).expand(tokens, experts)
            for s in starts
        ]

        def once(x: Tensor = x, gates: Tensor = gates, ids: list[Tensor] = ids) -> None:
            for i in ids:
                ops.expert_ffn_table(x, i.contiguous(), gates, table)

        rows.append((1, experts, experts * tokens))
        seconds.append(_median_seconds(once, device, budget) / len(ids))
    launch, expert, pair = fit(rows, seconds)
    return float(launch), float(expert), float(pair)


def _copy_seconds(host: Tensor, pool: Tensor, size: int, copies: int, budget: float) -> float:
    step, room = max(size, 256), host.numel() // max(size, 256)

    def once() -> None:
        for i in range(min(copies, room)):
            at = i * step
            pool[at : at + size].copy_(host[at : at + size], non_blocking=True)

    return _median_seconds(once, host.device if not pool.is_cuda else pool.device, budget)


def _median_seconds(once: Callable[[], None], device: torch.device, budget: float) -> float:
    """Median seconds of one call; on a GPU from a CUDA graph, as the engine runs it."""
    once()
    times: list[float] = []
    stop = time.perf_counter() + budget
    if device.type != "cuda":
        while len(times) < 3 or (time.perf_counter() < stop and len(times) < 200):
            start = time.perf_counter()
            once()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    while len(times) < 3 or (time.perf_counter() < stop and len(times) < 200):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(times)
