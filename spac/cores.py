"""How many threads the CPU's side may take."""

from __future__ import annotations

import os
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of CPU time, and per how many


def cores() -> int:
    """Cores of this process: those it may run on, hyperthreads once, no more than its quota."""
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    siblings = set()
    for cpu in mine:
        file = _CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        siblings.add(file.read_text() if file.exists() else str(cpu))
    count = len(siblings) or os.cpu_count() or 1
    quota = _QUOTA.read_text().split() if _QUOTA.exists() else ["max"]
    if quota[0] != "max":
        count = min(count, max(int(quota[0]) // int(quota[1]), 1))
    return count


def set_ffn_threads(wanted: int | None, gpu: bool) -> int:
    """Let the CPU's FFN use `wanted` threads in the whole process; returns how many.

    None: beside a GPU every core but one, which launches and waits; without one what it was (by
    default torch's number).
    """
    import torch

    from spac import _C  # noqa: F401  (loads the operators)

    if wanted is None and not gpu:
        return torch.get_num_threads()
    threads = max(cores() - 1, 1) if wanted is None else wanted
    torch.ops.spac.set_cpu_threads(threads)
    return threads
