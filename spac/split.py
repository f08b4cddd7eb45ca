"""How many of a window's missing experts the GPU reads from host memory, learnt while it runs.

The first answer comes from the cost model, which was measured with nothing else going on. In a
window the copies share the link, the kernels share their time with resident experts, and CPU and
link share the host's memory. The worker's clock shows when it began and ended each layer, the
device how long it waited for the answer. If it did, it was ready so much before the worker; if not,
the layer took as long as the device needed, and what lies between two layers is known from those
where it waited.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from spac.cost import CostModel, fit
from spac.state import LayerState

_WINDOWS = 32  # that an answer rests on
_REFIT = 8  # windows from one answer to the next
_BACK = 0.05  # of the way to the measured model, an answer, where nothing is seen
# (experts, pairs) at which the measured model goes on having a say, one row in twenty
_PRIOR = np.array([(1, 1), (2, 2), (4, 4), (8, 8), (8, 16), (16, 32)], dtype=float)


@dataclass(frozen=True)
class Work:
    """What one window's layers had to do, and when the worker was busy with it."""

    width: int  # tokens
    # int64 [L, 4]: pairs, resident pairs, experts, resident experts (`spac.reference.verify`)
    counts: np.ndarray
    streamed: np.ndarray  # int64 [L], experts that the GPU read
    times: np.ndarray  # [L, 2] seconds: the worker's begin and end, 0 if it had nothing to do
    waited: np.ndarray  # [L] seconds that the device waited for it


class WorkClock:
    """Tells what each window did from what was counted before and after it."""

    def __init__(self) -> None:
        self.times: np.ndarray | None = None  # of the last window, if it went by flags
        self._counted: tuple[np.ndarray, np.ndarray] | None = None

    def work(self, width: int, state: LayerState) -> Work | None:
        """Of the last window, of `width` tokens; None if its times are not known."""
        times, self.times = self.times, None
        before, self._counted = self._counted, (state.counters.numpy(), state.streamed.numpy())
        if times is None or before is None:
            return None
        waited = state.waited.numpy() * 1e-6
        counts, streamed = (now - then for now, then in zip(self._counted, before, strict=True))
        return Work(width, counts, streamed[:, 0], times, waited)


class Split:
    """`streams` int32 [E + 1]: how many to read when n are missing; replaced, never changed."""

    def __init__(self, costs: CostModel, num_experts: int, within: float = 1.05) -> None:
        """within: as of `CostModel.streams`."""
        self.costs, self._within = costs, within
        self.streams = costs.streams(num_experts, within=within)
        self._first = costs
        self._rows: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=_WINDOWS)
        # [n, 3]: experts that a layer streamed, seconds of its resident ones, seconds of both
        self._ready: deque[np.ndarray] = deque(maxlen=_WINDOWS)
        self._rest: dict[int, deque[float]] = {}  # seconds from one layer's end to the next bell
        self._seen = 0

    def observe(self, work: Work) -> None:
        """Take in one window."""
        pairs, here_pairs, experts, here = work.counts.astype(float).T
        begin, end = work.times.T
        missing = experts - here
        left = missing - work.streamed
        worked = (begin > 0) & (end > begin) & (left > 0)
        left_pairs = (pairs - here_pairs) * left / np.maximum(missing, 1)
        all_streamed = missing.any() and not left.any()
        if not (worked.any() or all_streamed) or (work.counts < 0).any():
            return
        if worked.any():
            rows = np.stack([np.ones_like(left), left, left_pairs], axis=1)
            self._rows.append((rows[worked], (end - begin)[worked]))
            self._ready.append(self._device(work, worked))
        self._seen += 1
        if self._seen % _REFIT == 0:
            self.costs = self._come_back() if all_streamed else self._refit()
            base = float(self.costs.gpu(here, here_pairs).mean())
            self.streams = self.costs.streams(len(self.streams) - 1, base, self._within)

    def seen(self) -> dict[str, dict[int, tuple[int, float, float]]]:
        """Of the last windows' layers how many, and mean and median seconds: "cpu" by the experts
        that the CPU had, "ready" by those that were streamed, until the GPU had its part; and
        "rest" by the width of a window, from one layer's end to the next one's bell."""
        nothing = np.empty((0, 3)), np.empty(0)
        rows, cpu = (np.concatenate(parts) for parts in zip(nothing, *self._rows, strict=True))
        streamed, _, ready = np.concatenate([np.empty((0, 3)), *self._ready]).T
        rest = {width: np.array(each) for width, each in self._rest.items() if each}
        return {
            "cpu": {int(n): _typical(cpu[rows[:, 1] == n]) for n in np.unique(rows[:, 1])},
            "ready": {int(n): _typical(ready[streamed == n]) for n in np.unique(streamed)},
            "rest": {width: _typical(each) for width, each in rest.items()},
        }

    def _device(self, work: Work, worked: np.ndarray) -> np.ndarray:
        """Of the layers where that can be told, a row of `_ready`."""
        begin, end = work.times.T
        gap, waited = begin[1:] - end[:-1], work.waited[:-1]
        follows = worked[:-1] & (gap > 0)
        if not follows.any():
            return np.empty((0, 3))
        second = follows & (waited > 2e-6)
        known = self._rest.setdefault(work.width, deque(maxlen=2 * _WINDOWS))
        if second.any():
            known.append(float(np.median(gap[second])))
        rest = float(np.median(known)) if known else float(gap[follows].min())
        device = np.where(second, (end - begin)[:-1] - waited, begin[1:] - begin[:-1] - rest)
        _, here_pairs, _, here = work.counts[:-1][follows].T
        base, streamed = self.costs.gpu(here, here_pairs), work.streamed[:-1][follows]
        return np.stack([streamed, base, device[follows]], axis=1)

    def _come_back(self) -> CostModel:
        """Everything is streamed, so that no clock runs: to the measured model, slowly, to see
        again."""
        one, first = (c.stream(1) / c.expert_bytes for c in (self.costs, self._first))
        new: dict[str, Any] = {"stream_byte": float(one + _BACK * (first - one))}
        for name in ("cpu_launch", "cpu_expert", "cpu_pair"):
            now = getattr(self.costs, name)
            new[name] = now + _BACK * (getattr(self._first, name) - now)
        return replace(self.costs, **new)

    def _refit(self) -> CostModel:
        rows, seconds = (np.concatenate(parts) for parts in zip(*self._rows, strict=True))
        prior = np.column_stack([np.ones(len(_PRIOR)), _PRIOR])
        again = max(1, len(rows) // (20 * len(prior)))
        # The measured model's mix at the speed of now: relative errors would else hold it back.
        speed = np.median(seconds / np.maximum(self._first.cpu(*rows[:, 1:].T), 1e-9))
        expected = np.maximum(self._first.cpu(*_PRIOR.T), 1e-9) * speed
        launch, expert, pair = fit(
            np.concatenate([rows, *[prior] * again]), np.concatenate([seconds, *[expected] * again])
        )
        one = float(self.costs.stream(1))
        streamed, resident, ready = np.concatenate(self._ready).T
        if (streamed > 0).any():
            each = np.maximum(ready - resident, 0)[streamed > 0] / streamed[streamed > 0]
            # A device that never waited hides how long it takes: less, until it does.
            least = 0.0 if any(self._rest.values()) else 1.1 * one
            one = max(float(np.median(each)), least)
        else:  # nothing is streamed: come back to the measured model, slowly, to see again
            one += _BACK * (float(self._first.stream(1)) - one)
        return replace(
            self.costs,
            cpu_launch=float(launch),
            cpu_expert=float(expert),
            cpu_pair=float(pair),
            stream_byte=max(one, 1e-9) / self.costs.expert_bytes,
        )


def _typical(seconds: np.ndarray) -> tuple[int, float, float]:
    """How many, mean and median."""
    return len(seconds), float(seconds.mean()), float(np.median(seconds))
