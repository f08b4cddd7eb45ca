"""The link is idle while a draft model runs: experts cross it then, without a grace period.

Once the host has read what a window gave, no kernel reads a slot until the next one begins. So the
forward thread, before it launches the draft, learns what the window did to the slots, declares the
pool quiet and goes on; the copy thread chooses (`Control.exchange`) and copies. Chosen there, the
draft's first launch does not wait for it; copied there, Ctrl-C never meets a slot half changed. The
next window finds the state on the host, and is launched without a wait for the draft's end.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

import numpy as np
import torch

from spac.control import Idle
from spac.copier import CopyThread
from spac.pool import SlotPool
from spac.state import LayerState

_DRAFTS = 9  # whose median says how long the next one takes


class Drafts:
    """Between two windows of an engine."""

    def __init__(
        self,
        pool: SlotPool,
        copier: CopyThread,
        state: LayerState,
        learn: Callable[[LayerState], None],
    ) -> None:
        """state: the device's; learn(state in host memory) tells the pool what windows changed."""
        self.wanted = False  # copies in drafts; without them `begin` does nothing
        self._pool, self._copier, self._device, self._learn = pool, copier, state, learn
        self._seconds: deque[float] = deque(maxlen=_DRAFTS)  # per token
        self._tokens = 0  # of the draft that is measured
        self._start: _Moment | None = None
        self._end: _Moment | None = None
        self._frequency: np.ndarray | None = None  # when the last window began
        self._state: LayerState | None = None  # at its end, if a draft runs since

    def begin(self, tokens: int) -> None:
        """The host has read all that the last window gave, and launches a draft of so many tokens
        next."""
        if not (self.wanted and tokens and self._copier.is_alive()):
            return
        if self._start is not None and self._end is not None:
            self._seconds.append(self._start.until(self._end) / self._tokens)
        self._start = self._end = None
        state = self._device.on_host()
        self._learn(state)
        self._tokens, self._state = tokens, state
        self._start = _Moment(self._pool.memory.is_cuda)
        self._pool.quiet = True
        if self._frequency is not None and self._seconds:
            until = time.perf_counter() + tokens * statistics.median(self._seconds)
            frequency = state.frequency.numpy()
            self._copier.submit(Idle(frequency, frequency - self._frequency, until))

    def end(self) -> LayerState:
        """A window begins, before its first `publish`: the state, in host memory."""
        if not self._pool.quiet:  # something else than the draft has run
            self._start = None
        self._end = self._end or _Moment(self._pool.memory.is_cuda)
        state, self._state = self._state, None
        if state is None:
            state = self._device.on_host()
            self._learn(state)
        self._frequency = state.frequency.numpy()
        return state


class _Moment:
    """When the device's current stream, if there is one, has come so far."""

    def __init__(self, cuda: bool) -> None:
        self._event: torch.cuda.Event | None = None
        if cuda:
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        self._time = time.perf_counter()

    def until(self, later: _Moment) -> float:
        """Seconds; both have passed."""
        if self._event is None or later._event is None:
            return later._time - self._time
        return 1e-3 * float(self._event.elapsed_time(later._event))
