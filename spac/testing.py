"""Faults on purpose, to see that spac survives them. Nothing here runs unless a test asks for it.

    with fault("copy", fail=OSError("bus error"), after=3) as f:
        ...
    assert f.calls > 3

A seam is a function of spac that hands work to something that can break. `fault` replaces it for
as long as the context lasts, in the whole process: code that is not under a fault pays nothing.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

SEAMS = {
    "measure": "spac.attachment:measure",  # cost measurement during attach
    "host memory": "spac.store:HostStore.adopt",  # one layer's weights, page-locked with a GPU
    "slot memory": "spac.pool:SlotPool.__init__",
    "draft": "spac.draft:ModelDraft.propose",
    "layer": "spac.engine:Engine._forward",  # the experts of one layer, both sides
    "experts": "spac.ops:expert_ffn_table",  # one side of it: from slots, or from host memory
    "cpu side": "spac.handoff:before_answer",  # the worker's rows of one layer, by flags
    "handed": "spac.handoff:HandOff.join",  # the wait for those rows
    "copy": "spac.copier:CopyThread._copy",  # experts into their slots
    "order": "spac.keep:ranked",  # experts, in the order in which copies and evictions go
    "solver": "spac.balance:Balancer._solve",  # (threshold index per layer, status) or None
}

_FOLDER = str(Path(__file__).parent)


@dataclass
class Fault:
    """How often the seam was reached, and how often it was tampered with."""

    calls: int = 0
    hits: int = 0


@contextmanager
def fault(
    seam: str,
    *,
    delay: float = 0.0,
    fail: BaseException | None = None,
    change: Callable[[Any], Any] | None = None,
    after: int = 0,
    times: int | None = None,
) -> Iterator[Fault]:
    """Tamper with calls of a seam of `SEAMS`: the first `after` pass, then `times` (None: all) do.

    A call waits `delay` seconds, then raises `fail`, or returns `change` of its real result.
    """
    if seam not in SEAMS:
        raise ValueError(f"seam: expected one of {', '.join(SEAMS)}, got {seam!r}")
    owner, name = _find(seam)
    real = getattr(owner, name)
    state = Fault()

    @functools.wraps(real)
    def tampered(*args: Any, **kwargs: Any) -> Any:
        state.calls += 1
        if state.calls <= after or (times is not None and state.calls > after + times):
            return real(*args, **kwargs)
        state.hits += 1
        time.sleep(delay)
        if fail is not None:
            raise fail
        result = real(*args, **kwargs)
        return result if change is None else change(result)

    setattr(owner, name, tampered)
    try:
        yield state
    finally:
        setattr(owner, name, real)


@contextmanager
def interrupted(after: int) -> Iterator[Fault]:
    """KeyboardInterrupt, as of Ctrl-C, where Python may look for signals in spac's code in this
    thread: when a function begins, or one of C has returned. The first `after` such places pass; it
    is raised at the next, and `hits` stays 0 if there is none.

    Left out are the instant after a lock was taken, against which Python has no means, and
    generators and finalizers, which may swallow it while something is thrown away.
    """
    state = Fault()

    def profile(frame: FrameType, event: str, function: Any) -> None:
        if event not in ("call", "c_return") or getattr(function, "__name__", "") == "acquire":
            return
        code, caller = frame.f_code, frame.f_back
        if caller is not None and caller.f_code is weakref.finalize.__call__.__code__:
            return
        if code.co_filename.startswith(_FOLDER) and not code.co_flags & inspect.CO_GENERATOR:
            state.calls += 1
            if state.calls == after + 1:
                state.hits += 1
                raise KeyboardInterrupt

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield state
    finally:
        sys.setprofile(before)


def _find(seam: str) -> tuple[Any, str]:
    module, _, path = SEAMS[seam].partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name
