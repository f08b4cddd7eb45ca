"""Memory spread over the NUMA nodes of a machine: its bandwidth is the sum of theirs.

An expert is read by all threads, wherever they run, so no node is the right one for it.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

_NODES = Path("/sys/devices/system/node/has_memory")
_MBIND = {"x86_64": 237, "aarch64": 235}  # system call numbers
_INTERLEAVE = 3


def nodes() -> list[int]:
    """NUMA nodes with memory that this process may use; one on most machines."""
    try:
        have = _parse(_NODES.read_text())
        status = Path("/proc/self/status").read_text()
    except OSError:
        return [0]
    allowed = next((x for x in status.splitlines() if x.startswith("Mems_allowed_list:")), "")
    return sorted(have & _parse(allowed.partition(":")[2])) or [0]


def interleave(address: int, nbytes: int, over: list[int] | None = None) -> bool:
    """Take the pages of a mapping, not touched yet, from the nodes `over` (default: all) in turn.

    Whether that was done: not with one node, nor where the system does not let us.
    """
    over = nodes() if over is None else over
    call = _MBIND.get(platform.machine())
    if len(over) < 2 or call is None or not hasattr(os, "sched_getaffinity"):
        return False
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask = (ctypes.c_ulong * (max(over) // bits + 1))()
    for node in over:
        mask[node // bits] |= 1 << node % bits
    arguments = ctypes.c_void_p(address), ctypes.c_ulong(nbytes), _INTERLEAVE, mask
    limit = ctypes.c_ulong(len(mask) * bits + 1)
    return ctypes.CDLL(None).syscall(call, *arguments, limit, 0) == 0


def _parse(text: str) -> set[int]:
    """The numbers of a list such as 0-1,4."""
    ranges = [part.partition("-") for part in text.strip().split(",") if part]
    return {n for first, _, last in ranges for n in range(int(first), int(last or first) + 1)}
