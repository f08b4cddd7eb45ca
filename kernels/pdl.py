"""Programmatic dependent launch: a kernel starts before the one in front of it has ended (Hopper).

The kernels of a decoder layer last a few microseconds each, most of it latency: of the launch, of
the first loads, of the last stores. A kernel that was launched with the attribute starts as soon as
every program of the one in front has called `let_next_start` or has ended. `wait_for_previous` then
holds it until all earlier kernels are complete and what they wrote is visible. So

- such a kernel reads and writes nothing that an earlier one may touch before it has waited. Before
  that come the weights, which no kernel writes, prefetches into L2, where they cannot become stale,
  and a layer's state (kernels/split_window.py), if what wrote it has ended long before. It is not
  enough that this came in front: a kernel that knows nothing of all this lets the next one start
  when its programs have ended, and what they wrote may not be visible before the wait. Every kernel
  that is launched so waits, also if it needs nothing of the previous one: the kernel behind it
  relies on that for all before it.
- kernels that wait for another agent, for the CPU (kernels/handoff.py) or for the copies of experts
  (kernels/tokens.py with places), neither let the next one start early nor are launched so, nor is
  the first kernel behind them (`chained=False`). Nor does the kernel that they stand behind,
  split_window, let anyone start early. Programs that start early take the room of a
  multiprocessor while they wait: behind a kernel that waits for the copy kernel they could keep
  that one from starting.

A stream capture turns the attribute into a programmatic edge of the graph. Other GPUs and the
interpreter compile none of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from spac.kernels.config import device_of

OFF, WAIT, WEIGHTS = range(3)
MODE = WEIGHTS  # WAIT: start early, but ask for no weights before the previous kernel is complete
# Of larger weights, what is asked for early delays the kernel in front more than it helps.
_MOST_BYTES = 14 << 20


def pdl_args(
    device: torch.device, chained: bool = True, read_early: Sequence[Tensor] = ()
) -> dict[str, int | bool]:
    """Keyword arguments of a launch whose kernel has EARLY, one of the modes above.

    chained: it may start early; False: only the next one may. read_early: what it gives to
    `prefetch`, which takes rows of whole 16 bytes; with others, and with large ones, it does
    nothing before it waits.
    """
    hopper = device.type == "cuda" and torch.version.hip is None and device_of(device).major >= 9
    if not hopper or MODE == OFF:
        return {"EARLY": OFF}
    whole = all(t.data_ptr() % 16 == t.shape[-1] * t.itemsize % 16 == 0 for t in read_early)
    small = sum(t.numel() * t.itemsize for t in read_early) <= _MOST_BYTES
    return {"EARLY": MODE if whole and small else WAIT, "launch_pdl": chained}


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    """From here on the next kernel may start, once all programs have come here."""
    if EARLY > 0:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(EARLY: tl.constexpr):
    """All kernels in front are complete, and what they wrote can be read."""
    if EARLY > 0:
        gdc_wait()


@triton.jit
def prefetch(ptr, offs, mask, length, CHUNKS: tl.constexpr, EARLY: tl.constexpr):
    """Fetches `length` elements behind each ptr + offs [N] into L2, in up to CHUNKS requests each.

    Nothing waits for them. Starts and lengths in bytes are multiples of 16. A warp makes its
    threads' requests one after the other, so they are large and N * CHUNKS is the threads' number.
    """
    if EARLY > 1:
        ITEM: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
        chunk = tl.maximum(512, tl.cdiv(tl.cdiv(length, CHUNKS), 64) * 64)
        begin = tl.arange(0, CHUNKS) * chunk
        nbytes = tl.minimum(tl.maximum(length - begin, 0), chunk) * ITEM
        nbytes = tl.where(mask[:, None], nbytes[None, :], 0)
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            setp.gt.s32 p, $2, 0;
            @p cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,r", [ptr + offs[:, None] + begin[None, :], nbytes], tl.int32, False, 1,
        )  # fmt: skip
