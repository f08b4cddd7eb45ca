"""Waiting for a flag that another kernel or the CPU sets, by the clock."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from spac.kernels.dot import INTERPRET

LONGEST = 3_000_000  # microseconds of a wait
_CLOCK = tl.constexpr(not INTERPRET)


@triton.jit
def _look(flag_ptr):
    """The flag, read by one thread: what every thread reads of host memory by itself would keep
    the link busy with nothing else."""
    offs = tl.arange(0, 128)
    return tl.max(tl.load(flag_ptr + offs, mask=offs == 0, other=0, volatile=True), axis=0)


@triton.jit
def wait_for(flag_ptr, value, failed_ptr, longest):
    """Until the flag is `value` or more; returns the microseconds that this took.

    A wait of more than `longest` microseconds sets `failed`, int32 in host memory, and goes on; if
    one has failed before, nobody waits any more. The interpreter, which has no clock, counts looks.
    No thread may read what the flag stands for before the caller's next barrier.
    """
    offs = tl.arange(0, 128)
    begin = globaltimer() if _CLOCK else 0
    waited = 0
    if _look(flag_ptr) < value:
        limit = tl.where(_look(failed_ptr) == 0, longest, 0)
        late = (limit == 0).to(tl.int32)
        here = late * 0
        while (here == 0) & (late == 0):
            flag = tl.load(flag_ptr + offs, mask=offs == 0, other=0, volatile=True)
            waited = ((globaltimer() - begin) // 1000).to(tl.int32) if _CLOCK else waited + 1
            # Of one thread, the clock as well, so that all go on together.
            found = tl.where(flag >= value, 2, (waited >= limit).to(tl.int32))
            found = tl.max(tl.where(offs == 0, found, 0), axis=0)
            here, late = found // 2, found % 2
        if here == 0:
            tl.store(failed_ptr, 1)
    return waited
