"""The machine that a figure belongs to, and how to time on it."""

from __future__ import annotations

import functools
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


@functools.cache
def machine_block() -> dict[str, str]:
    """Processor, memory, GPU and versions; nothing that names the machine."""
    block = {
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        block["gpu"] = f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)"
        block["cuda"] = str(torch.version.cuda)
        if driver := _driver():
            block["driver"] = driver
    for package in ("torch", "triton", "transformers", "numpy", "spac"):
        try:
            block[package] = version(package)
        except PackageNotFoundError:
            continue
    return block


def _driver() -> str | None:
    file = Path("/proc/driver/nvidia/version")
    match = re.search(r"\d{3,}\.\d+(\.\d+)?", file.read_text()) if file.exists() else None
    return match and match[0]


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def time_cpu(
    contenders: dict[str, Callable[[], object]], repeats: int, warmup: int = 1
) -> dict[str, float]:
    """Median seconds of each contender; they take turns, so that noise meets all of them."""
    for _ in range(warmup):
        for run in contenders.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def time_cuda_graph(
    contenders: dict[str, list[Callable[[], object]]], repeats: int
) -> dict[str, float]:
    """Median seconds per call on the GPU: each contender's calls (one per input set, so that no
    cache helps) are captured in one CUDA graph, and the graphs are replayed in turn."""
    graphs = {}
    for name, calls in contenders.items():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in calls:  # compile and warm up outside the capture
                call()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for call in calls:
                call()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats + 1):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3 / len(contenders[name]))
    return {name: statistics.median(s[1:]) for name, s in seconds.items()}


def read_bandwidth(threads: int, repeats: int = 7, size: int = 256 << 20) -> float:
    """Bytes per second that `threads` threads read from memory: a sum over `size` bytes."""
    data = torch.ones(size // 4, dtype=torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return size / time_cpu({"read": data.sum}, repeats)["read"]
    finally:
        torch.set_num_threads(before)
