"""Brings experts from pinned host memory into GPU memory while other kernels run.

Host memory is read in order and in large pieces, which leaves more of its bandwidth to the CPU than
an expert FFN that walks through the rows of many programs at once. Whoever needs an expert waits
for its flag (`wait_for_place`), so that the first experts are used while the last ones are coming.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from spac.kernels.flag import LONGEST, wait_for

_PROGRAMS = 64  # of 16 KB in flight each
_BLOCK = 4096


@triton.jit
def _pull_kernel(
    source_ptr,
    target_ptr,
    flags_ptr,
    arrived_ptr,
    words,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (programs,): all of them copy the first expert, then the next one."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    offs = tl.arange(0, BLOCK)
    for place in range(PLACES):
        address = tl.load(source_ptr + place)
        if address != 0:
            from_ptr = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)
            target = tl.load(target_ptr + place)
            to_ptr = tl.multiple_of(target.to(tl.pointer_type(tl.int32)), 16)
            for begin in range(pid * BLOCK, words, programs * BLOCK):
                at = begin + offs
                tl.store(to_ptr + at, tl.load(from_ptr + at, mask=at < words), mask=at < words)
            tl.debug_barrier()  # every thread has stored before one of them says so
            before = tl.atomic_add(arrived_ptr + place, 1, sem="acq_rel")
            if before == programs - 1:
                tl.store(arrived_ptr + place, 0)
                tl.atomic_xchg(flags_ptr + place, 1, sem="release")


@triton.jit
def wait_for_place(flags_ptr, place, failed_ptr, longest):
    """Until the expert of this place has come, or `wait_for` gives up."""
    wait_for(flags_ptr + place, 1, failed_ptr, longest)
    tl.atomic_add(flags_ptr + place, 0, sem="acquire")
    tl.debug_barrier()  # no thread reads the expert before all have seen it


@triton.jit
def _wait_kernel(source_ptr, flags_ptr, failed_ptr, longest, PLACES: tl.constexpr):
    for place in range(PLACES):
        if tl.load(source_ptr + place) != 0:
            wait_for_place(flags_ptr, place, failed_ptr, longest)


def pull(places: Any, nbytes: int) -> None:
    """Fill the places whose source is not 0; the flag of a place becomes 1 when it is complete.

    places: `spac.layout.Places`; nbytes, a multiple of 4: of an expert.
    """
    _pull_kernel[(_PROGRAMS,)](
        places.source,
        places.target,
        places.flags,
        places.arrived,
        nbytes // 4,
        PLACES=len(places.source),
        BLOCK=_BLOCK,
        num_warps=8,
    )


def wait(places: Any, longest: int = LONGEST) -> None:
    """Let the kernels launched from here begin when every place is complete."""
    _wait_kernel[(1,)](
        places.source,
        places.flags,
        places.failed,
        longest,
        PLACES=len(places.source),
        num_warps=1,
    )


def place_args(table: Any) -> dict[str, Any]:
    """Keyword arguments of the kernels that wait for experts in the places of an ExpertTable."""
    places = table.places
    if places is None:
        return {"place_ptr": None, "flags_ptr": None, "failed_ptr": None, "WAIT": False}
    return {
        "place_ptr": places.of,
        "flags_ptr": places.flags,
        "failed_ptr": places.failed,
        "WAIT": True,
    }
