"""The link is idle while a draft model runs: experts cross it then, without a grace period.

Once the host has read what a window gave, no kernel reads a slot until the next one begins. So the
forward thread, while the first step of the draft runs, learns what the window did to the slots and
declares the pool quiet; the copy thread chooses (`Control.exchange`) and copies. So the host delays
the draft by one small copy, and Ctrl-C never meets a slot half changed. The next window finds the
state on the host, and is launched without a wait for the draft's end. Without a draft, or with one
that is too short, the state is sent when a window begins, and learnt when it is under way, unless a
change has to be published.
"""

from __future__ import annotations

import statistics
import time
from collections import deque

import numpy as np
import torch

from spac import keep
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
        pull: Pull,
    ) -> None:
        """state: the device's."""
        self.wanted = False  # copies in drafts; without them `begin` does nothing
        self._pool, self._copier, self._device = pool, copier, state
        self._pull = pull
        self._seconds: deque[float] = deque(maxlen=_DRAFTS)  # per token
        self._tokens = 0  # of the draft that is measured
        self._expected: float | None = None  # seconds that it will take, if that is known
        self._copies = False  # experts may be copied meanwhile
        self._until = 0.0  # time.perf_counter() when a draft with copies is expected to end
        self._start: _Moment | None = None
        self._end: _Moment | None = None
        # A copy of the state to the host that nobody has read yet, and when it is there.
        self._pending = False
        self._sent: torch.cuda.Event | None = None
        self._frequency: np.ndarray | None = None  # when the last window began
        self._state: LayerState | None = None  # at its end, if it is known already

    def begin(self, tokens: int) -> None:
        """The host has read all that the last window gave, and launches a draft of so many tokens
        next. RuntimeError if the link failed in that window."""
        if self._start is not None and self._end is not None:
            self._seconds.append(self._start.until(self._end) / self._tokens)
        self._start = self._end = None
        self._copies = False
        if not (self.wanted and tokens and self._copier.is_alive()):
            return
        self._tokens = tokens
        self._expected = tokens * statistics.median(self._seconds) if self._seconds else None
        self._copies = self._expected is None or self._expected >= keep.SHORTEST_DRAFT
        if self._copies:
            self._send()
        self._start = _Moment(self._pool.memory.is_cuda)

    def launched(self) -> None:
        """The first step of the draft that `begin` announced is on its way."""
        if self._start is None or not self._copies:
            return
        state = self.learn()
        if state is None:
            return
        self._pool.quiet = True
        if self._frequency is not None and self._expected is not None:
            self._until = self._start.host + self._expected
            frequency = state.frequency.numpy()
            self._copier.begun.clear()
            self._copier.submit(Idle(frequency, frequency - self._frequency, self._until))

    def end(self) -> None:
        """A window begins. RuntimeError if the link failed in the one before."""
        if self._copies and not self._pool.quiet:  # something else than the draft has run
            self._start = None
        if self._start is not None and self._end is None:
            self._end = _Moment(self._pool.memory.is_cuda)
        if self._pool.quiet:  # the host is ahead of the draft: the copy thread may have Python
            self._copier.begun.wait(max(self._until - time.perf_counter(), 0.0))
        else:  # not even if the state is known: a window that came to no end has run since
            self._send()

    def learn(self) -> LayerState | None:
        """Let the pool follow what windows have changed, if it has not. Before the next `publish`;
        the next window may be under way."""
        if self._pending:
            state = self._device.receive(self._sent)
            self._pull.learn(state.exchanged, self._pool)
            self._state, self._pending = state, False
        return self._state

    def take(self) -> LayerState | None:
        """The state when the window began, in host memory."""
        state, self._state = self.learn(), None
        if state is not None:
            self._frequency = state.frequency.numpy()
        return state

    def catch_up(self) -> None:
        """Let the pool follow what all windows so far have changed; none is under way."""
        self._send()
        self.take()

    def _send(self) -> None:
        self.learn()  # what Ctrl-C has left
        self._pull.check()
        self._sent = self._device.send()
        self._pending = True
        self._device.exchanged.fill_(-1)


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
