"""The link is idle while a draft model runs: experts cross it then, without a grace period.

Once the host has read what a window gave, no kernel reads a slot until the next one begins. So the
forward thread, while the first step of the draft runs, learns what the window did to the slots and
declares the pool quiet; the copy thread chooses (`Control.exchange`) and copies. So the host delays
the draft by one small copy, and Ctrl-C never meets a slot half changed. The next window finds the
state on the host, and is launched without a wait for the draft's end.
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
from spac.pull import Pull
from spac.state import LayerState

_DRAFTS = 9  # whose median says how long the next one takes


class Drafts:
    """Between two windows of an engine."""

    def __init__(
        self,
        pool: SlotPool,
        copier: CopyThread,
        state: LayerState,
        pull: Pull | None,
        learn: Callable[[LayerState], None],
    ) -> None:
        """state: the device's; learn(state in host memory) tells the pool what windows changed."""
        self.wanted = False  # copies in drafts; without them `begin` does nothing
        self._pool, self._copier, self._device = pool, copier, state
        self._pull, self._learn = pull, learn
        self._seconds: deque[float] = deque(maxlen=_DRAFTS)  # per token
        self._tokens = 0  # of the draft that is measured
        self._start: _Moment | None = None
        self._end: _Moment | None = None
        self._sent: torch.cuda.Event | None = None
        self._frequency: np.ndarray | None = None  # when the last window began
        self._state: LayerState | None = None  # at its end, if a draft runs since

    def begin(self, tokens: int) -> None:
        """The host has read all that the last window gave, and launches a draft of so many tokens
        next. RuntimeError if the link failed in that window."""
        if self._start is not None and self._end is not None:
            self._seconds.append(self._start.until(self._end) / self._tokens)
        self._start = self._end = None
        if not (self.wanted and tokens and self._copier.is_alive()):
            return
        self._check()
        self._tokens, self._sent = tokens, self._device.send()
        self._start = _Moment(self._pool.memory.is_cuda)

    def launched(self) -> None:
        """The first step of the draft that `begin` announced is on its way."""
        if self._start is None:
            return
        state = self._device.receive(self._sent)
        self._learn(state)
        self._state = state
        self._pool.quiet = True
        if self._frequency is not None and self._seconds:
            until = self._start.host + self._tokens * statistics.median(self._seconds)
            frequency = state.frequency.numpy()
            self._copier.submit(Idle(frequency, frequency - self._frequency, until))

    def end(self) -> LayerState:
        """A window begins, before its first `publish`: the state, in host memory."""
        if not self._pool.quiet:  # something else than the draft has run
            self._start = None
        if self._start is not None and self._end is None:
            self._end = _Moment(self._pool.memory.is_cuda)
        state, self._state = self._state, None
        if state is None:
            self._check()
            state = self._device.on_host()
            self._learn(state)
        self._frequency = state.frequency.numpy()
        return state

    def _check(self) -> None:
        if self._pull is not None:
            self._pull.check()


class _Moment:
    """When the device's current stream, if there is one, has come so far."""

    def __init__(self, cuda: bool) -> None:
        self._event: torch.cuda.Event | None = None
        if cuda:
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        self.host = time.perf_counter()

    def until(self, later: _Moment) -> float:
        """Seconds; both have passed."""
        if self._event is None or later._event is None:
            return later.host - self.host
        return 1e-3 * float(self._event.elapsed_time(later._event))
