"""Automatic draft length: how many tokens to draft before the next verify window.

With acceptance a (each drafted token is kept with chance a if the ones before it were), a window of
gamma drafted tokens yields 1 + a + a^2 + ... + a^gamma tokens. The controller picks the gamma with
the most expected tokens per second,

    rate(gamma) = expected_tokens(a, gamma) / (step(gamma) + draft(gamma)),

0 included: without drafting nothing is risked. Seconds are medians of what was measured at that
gamma, times a drift that all lengths share (a cache that warms up speeds every window), drawn
towards a non-decreasing line through all lengths (or the cost model's curve, if one is given) as if
that were three measurements more. Deterministic.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np


def parse_draft_length(text: str) -> int | str:
    """What a command line says of --num-draft-tokens: a number or "auto"; ValueError."""
    if text != "auto" and not text.isdecimal():
        raise ValueError(f'--num-draft-tokens: expected a number >= 0 or "auto", got {text}')
    return text if text == "auto" else int(text)


def expected_tokens(acceptance: float, gamma: int) -> float:
    """Mean tokens that one window of gamma drafted tokens yields (1..gamma + 1)."""
    return 1.0 + sum(acceptance**i for i in range(1, gamma + 1))


class DraftLengthController:
    """Chooses gamma in 0..max_gamma; tell it what every step did with `observe`.

    predict(gamma) -> seconds of a verify step, from a cost model, replaces the straight line. Now
    and then another gamma is measured twice: the one whose figure is oldest among those that could
    still win. Such a look waits until it is expected to cost at most 1 % of the time since the last
    one, and at least `interval` steps.
    """

    LOOKING = 0.01  # share of the time that looks may cost
    PRIOR = 3.0  # measurements that the line through all lengths counts
    CHANGE = 1.03  # what another length must promise, or noise would change the window all the time

    def __init__(
        self,
        max_gamma: int,
        predict: Callable[[int], float] | None = None,
        interval: int = 32,
        acceptance: float = 0.6,
        memory: int = 256,
    ) -> None:
        if max_gamma < 0:
            raise ValueError(f"max_gamma: needed at least 0, got {max_gamma}")
        self.max_gamma, self._predict, self._interval = max_gamma, predict, interval
        self.reason = "measuring: nothing is known yet"
        self._decay = 1 - 1 / memory
        # Two drafted tokens' worth of the prior: it fades with the first real windows.
        self._kept, self._tried = 2.0 * acceptance, 2.0
        self._step: dict[int, deque[float]] = {}
        self._median: dict[int, float] = {}  # of self._step
        self._draft: deque[float] = deque(maxlen=9)  # seconds per drafted token
        self._seen: dict[int, int] = {}  # gamma -> step of its last observation
        self._steps, self._next_look, self._credit = 0, interval, 0.0
        self._best: int | None = None
        self._drift = 1.0  # seconds now / seconds when measured, smoothed
        self._strays: deque[float] = deque(maxlen=9)  # |log(seconds / expected)|
        # Two lengths pin the line; three each, in turn, since the first are cold.
        ends = dict.fromkeys(((max_gamma + 1) // 2, 0))
        self._opening = deque([*ends] * 3)

    @property
    def acceptance(self) -> float:
        """Estimated chance that a drafted token is kept, given that those before it were."""
        return self._kept / self._tried

    def observe(
        self, gamma: int, accepted: int, step_seconds: float, draft_seconds: float = 0.0
    ) -> None:
        """One step: `accepted` of `gamma` drafted tokens kept, seconds of verify and of drafting.

        The step does not have to be at the gamma that `choose` named (text may end earlier).
        """
        if not 0 <= accepted <= gamma:
            raise ValueError(f"accepted: needed 0..{gamma}, got {accepted}")
        if not (math.isfinite(step_seconds) and step_seconds > 0 and draft_seconds >= 0):
            raise ValueError(
                f"seconds: needed positive finite numbers, got {step_seconds}, {draft_seconds}"
            )
        self._steps += 1
        tried = min(accepted + 1, gamma)  # the first rejection ends the trials of a window
        if tried:
            decay = self._decay**tried
            self._kept = self._kept * decay + accepted
            self._tried = self._tried * decay + tried
        if gamma in self._step:
            # By the sign alone, as far as steps usually stray: steps that stall now and then would
            # else raise the drift, which a median does not follow, without end.
            off = math.log(step_seconds / (self._drift * self._median[gamma]))
            usual = statistics.median(self._strays or [abs(off)])
            self._drift *= math.exp(math.copysign((0.3 if self._steps < 32 else 0.1) * usual, off))
            self._strays.append(min(abs(off), 2.0))
        times = self._step.setdefault(gamma, deque(maxlen=31))
        times.append(step_seconds / self._drift)
        self._median[gamma] = statistics.median(times)
        self._seen[gamma] = self._steps
        if gamma:
            self._draft.append(draft_seconds / gamma)
        self._credit += self.LOOKING * (step_seconds + draft_seconds)
        # A shorter draft answers as well: a text may never offer as much. None at all says nothing.
        if self._opening and min(1, self._opening[0]) <= gamma <= self._opening[0]:
            self._opening.popleft()

    def seconds(self, gamma: int) -> float:
        """Predicted seconds of one step with its drafting."""
        draft = statistics.median(self._draft) * gamma if self._draft else 0.0
        return self._verify_seconds(gamma) + draft

    def rate(self, gamma: int) -> float:
        """Predicted tokens per second."""
        return expected_tokens(self.acceptance, gamma) / self.seconds(gamma)

    def choose(self) -> int:
        """The gamma of the next step; `reason` then says why in one line."""
        if self._opening:
            self.reason = f"measuring gamma {self._opening[0]}"
            return self._opening[0]
        rates = [self.rate(g) for g in range(self.max_gamma + 1)]
        best = int(np.argmax(rates))
        if self._best is not None and rates[best] < self.CHANGE * rates[self._best]:
            best = self._best
        self._best = best
        if self._steps >= self._next_look and self.max_gamma:
            look = self._stalest(rates, best)
            lost = self.seconds(look) - expected_tokens(self.acceptance, look) / rates[best]
            if self._credit >= 2 * lost:
                self._credit = 0.0
                self._next_look = self._steps + self._interval
                self._opening.extend([look] * 2)
                self.reason = f"measuring gamma {look} again ({self._summary(rates, best)})"
                return look
        self.reason = self._summary(rates, best)
        return best

    def _stalest(self, rates: Sequence[float], best: int) -> int:
        """Who may still win: within 30 % of the best, or its neighbour, or no drafting at all."""
        able = [
            g
            for g in range(self.max_gamma + 1)
            if g != best and (rates[g] > 0.7 * rates[best] or abs(g - best) == 1 or g == 0)
        ]
        return min(able, key=lambda g: (self._seen.get(g, -1), -rates[g]))

    def _summary(self, rates: Sequence[float], best: int) -> str:
        other = 0 if best else max(range(1, len(rates)), key=lambda g: rates[g], default=0)
        text = (
            f"gamma {best}: {rates[best]:.4g} tokens/s expected, acceptance {self.acceptance:.2f}"
        )
        return text if other == best else f"{text}; gamma {other} would give {rates[other]:.4g}"

    def _verify_seconds(self, gamma: int) -> float:
        lengths = sorted(self._step)
        if not lengths:
            return self._predict(gamma) if self._predict else 1.0 + 0.1 * gamma
        times = [self._median[g] for g in lengths]
        counts = [len(self._step[g]) for g in lengths]
        if self._predict:
            ratio = [t / self._predict(g) for g, t in zip(lengths, times, strict=True)]
            line = self._predict(gamma) * float(np.interp(gamma, lengths, ratio))
        else:
            line = _line(lengths, times, counts, gamma)
        count = len(self._step.get(gamma, ()))
        total = count * self._median.get(gamma, 0.0)
        return self._drift * (total + self.PRIOR * line) / (count + self.PRIOR)


def _line(x: Sequence[int], y: Sequence[float], weights: Sequence[int], at: int) -> float:
    """The weighted least squares line through (x, y) at `at`; its slope is not negative."""
    points, total = list(zip(x, y, weights, strict=True)), sum(weights)
    x_mean = sum(w * a for a, _, w in points) / total
    y_mean = sum(w * b for _, b, w in points) / total
    spread = sum(w * (a - x_mean) ** 2 for a, _, w in points)
    both = sum(w * (a - x_mean) * (b - y_mean) for a, b, w in points)
    slope = max(both / spread, 0.0) if spread else 0.0
    return y_mean + slope * (at - x_mean)
