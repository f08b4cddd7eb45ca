"""The physical floor of a decode step, and how busy the GPU was."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import spac._C  # noqa: F401  (loads the operators)


@dataclass
class Machine:
    """Bytes per second measured in this run: the physical floor of a step."""

    read: float  # the CPU reads expert weights
    link: float  # pinned copies to the GPU
    memory: float  # the GPU reads its memory


def gpu_busy_share(device: torch.device, work: Callable[[], object]) -> float | None:
    """Share of `work`'s wall time in which a kernel ran, from torch's profiler; None without."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            start = time.perf_counter()
            work()
            sync(device)
            wall = time.perf_counter() - start
        spans = sorted(
            (e.time_range.start, e.time_range.end)
            for e in profiler.events()
            if e.device_type == torch.autograd.DeviceType.CUDA and "Mem" not in e.name
        )
    except RuntimeError:  # no permission for the counters
        return None
    busy, until = 0.0, 0.0
    for begin, end in spans:
        busy += max(end - max(begin, until), 0.0)
        until = max(until, end)
    return busy * 1e-6 / wall if busy else None


def measure_machine(blobs: list[Tensor], device: torch.device) -> Machine:
    """Read, copy and device bandwidths over the store itself, so that no cache flatters them."""
    block = blobs[0][: max(1, (64 << 20) // blobs[0].shape[1])]
    target = torch.empty_like(block, device=device)
    other = torch.empty_like(target)

    def best(run: Callable[[Tensor], object], nbytes: Callable[[Tensor], int]) -> float:
        rates = []
        for source in (*blobs, *blobs)[:8]:
            sync(device)
            start = time.perf_counter()
            run(source)
            sync(device)
            rates.append(nbytes(source) / (time.perf_counter() - start))
        return statistics.median(rates)

    def size(_: Tensor) -> int:
        return 8 * block.nbytes

    def copies(source: Tensor) -> None:
        for _ in range(8):
            target.copy_(source[: len(block)], non_blocking=True)

    return Machine(
        read=best(torch.ops.spac.cpu_read, lambda source: source.nbytes),
        link=best(copies, size),
        memory=best(lambda _: [other.copy_(target) for _ in range(8)], lambda _: 2 * size(_)),
    )


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
