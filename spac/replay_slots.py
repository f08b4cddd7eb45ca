"""Slots of a replay, and how copies get into them: as they come, or in rounds like the engine's."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spac.cost import CostModel
from spac.keep import COPIES_LATER, SHORTEST_DRAFT, exchange, margin, ranked, stream_and_keep
from spac.policy import Policy


class Slots:
    """Residency, and the one copy that is under way. Experts are flat indices layer * E + e."""

    def __init__(
        self,
        layers: int,
        experts: int,
        slots: int,
        cost: CostModel,
        first: NDArray[np.float64] | None = None,
    ) -> None:
        self.resident = np.zeros(layers * experts, dtype=bool)
        index = np.arange(min(slots, layers * experts))
        if first is None:
            expert, layer = np.divmod(index, layers)  # the engine's first fill
            self.resident[layer * experts + expert] = True
        else:
            self.resident[np.argsort(-first.ravel(), kind="stable")[: len(index)]] = True
        self.free = slots - len(index)
        self.cost, self.copy_seconds = cost, float(cost.h2d(1))
        self.coming, self.left = -1, 0.0
        self.unused = np.zeros_like(self.resident)  # copied, no pair yet
        self.started = self.wasted = self.kept = 0
        self.margin = 0.0

    def begin_window(self, policy: Policy, drafting: float = 0.0) -> None:
        """Before a window's layers: copies made use of the seconds that its draft took."""
        self.run(drafting)

    def under_way(self) -> NDArray[np.intp]:
        """Experts whose copy has begun and that no pair can use yet."""
        return np.array([self.coming] if self.coming >= 0 else [], dtype=np.intp)

    def link_seconds(self, streamed: ArrayLike) -> NDArray[np.float64]:
        """Until so many experts of a layer have been read: the copy under way ends first."""
        read = self.cost.stream(streamed)
        return np.where(read > 0, self.left + read, 0.0)

    def stream(self, streamed: int) -> float:
        """Read so many experts over the link; the seconds that it takes. Copies go on meanwhile as
        the link allows."""
        took = float(self.link_seconds(streamed))
        self.finish()
        return took

    def rank(self, policy: Policy) -> None:
        """Take the policy's order for what follows."""
        score = policy.score().ravel()
        self.margin = policy.margin
        self.keep = np.where(self.resident, score, np.inf)
        self.want = np.where(self.resident, -np.inf, score)
        if (wanted := policy.wanted()) is not None:
            self.want[~wanted.ravel()] = -np.inf
        if self.coming >= 0:
            self.want[self.coming] = -np.inf

    def make_room(self, score: float) -> bool:
        """Free one slot for an expert of this score, if it beats the least resident."""
        if self.free:
            self.free -= 1
            return True
        victim = int(self.keep.argmin())
        if not score > self.keep[victim] + self.margin:
            return False
        self.wasted += int(self.unused[victim])
        self.unused[victim] = self.resident[victim] = False
        self.keep[victim] = np.inf
        return True

    def settle(self, expert: int, score: float) -> None:
        self.resident[expert] = True
        self.keep[expert], self.want[expert] = score, -np.inf

    def finish(self) -> float:
        """Seconds until the copy under way arrives; it is then resident."""
        left, self.left = self.left, 0.0
        if self.coming >= 0:
            self.settle(self.coming, self.arrival_score)
            self.coming = -1
        return left

    def run(self, seconds: float) -> None:
        """Let copies progress for this long."""
        while seconds > 0:
            if self.coming < 0:
                best = int(self.want.argmax())
                score = float(self.want[best])
                if score == -np.inf or not self.make_room(score):
                    return
                self.coming, self.left, self.arrival_score = best, self.copy_seconds, score
                self.want[best], self.unused[best] = -np.inf, True
                self.started += 1
            if self.left > seconds:
                self.left -= seconds
                return
            seconds -= self.finish()


class Rounds(Slots):
    """As the engine copies: one round a window, of at most `most` experts.

    When a window begins, the slots of the last round's victims are free and the copies that have
    ended are seen; then the round's copies start into free slots, in the order of the scores, and
    victims are chosen for the newcomers that found none. Streams share the link with the copies.
    prompt: the policy knows a prompt, so that the first two rounds have no limit.
    keep: what streams may stay (`spac.keep`), seen when the next window begins, and rounds go by
    values. draft_copies: while a draft runs, experts of the window before it are exchanged at once.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        slots: int,
        cost: CostModel,
        most: int,
        first: NDArray[np.float64] | None = None,
        prompt: bool = False,
        keep: bool = False,
        draft_copies: bool = False,
    ) -> None:
        super().__init__(layers, experts, slots, cost, first)
        self.most, self._unlimited = most, 2 * (prompt and most > 0 and not keep)
        self.keep_streamed, self.draft_copies = keep, draft_copies
        self._pairs = np.zeros((layers, experts))  # of the last window
        self._streamed = 0  # experts, in that window
        self._queue: list[int] = []  # copies of the round, in order
        self._arrived: list[int] = []
        self._leaving: list[int] = []
        self._kept: list[tuple[int, int]] = []  # (newcomer, whose slot it took) of the last window

    def begin_window(self, policy: Policy, drafting: float = 0.0) -> None:
        idle = max(drafting - self.left, 0.0)
        self.run(drafting)
        for new, old in self._kept:
            self._replace(new, old)
        self._kept = []
        if self.draft_copies and self._pairs.any() and drafting >= SHORTEST_DRAFT:
            self._exchange(policy, int(max(idle - COPIES_LATER, 0.0) / self.copy_seconds))
        self.resident[self._leaving] = False
        self.unused[self._leaving] = False
        self.free += len(self._leaving)
        self._leaving = []
        self.resident[self._arrived] = True
        self._arrived = []
        if not self._queue:
            self._round(policy)
        if self.keep_streamed:
            value = policy.value().ravel().copy()
            value[self._queue] = -np.inf
            value[self._leaving] = np.inf
            self._value = value.reshape(self._pairs.shape)
        self._streamed = 0

    def _exchange(self, policy: Policy, most: int) -> None:
        """By the values that the last window began with: it has ended only now."""
        key = (self._value + policy.pair * self._pairs).ravel()
        missing = ~self.resident & (key > -np.inf)
        if (wanted := policy.wanted()) is not None:
            missing &= wanted.ravel()
        for new, old in zip(
            *exchange(key, ranked(key, missing)[:most], self.resident), strict=True
        ):
            self._replace(int(new), int(old))
            self.unused[new] = True
            self.started += 1

    def _replace(self, new: int, old: int) -> None:
        self.wasted += int(self.unused[old])
        self.unused[old] = self.resident[old] = False
        self.resident[new] = True

    def rank(self, policy: Policy) -> None:
        """Nothing: a round keeps the order that it began with."""

    def _round(self, policy: Policy) -> None:
        by_value = self.keep_streamed
        score = (policy.value() if by_value else policy.score()).ravel()
        least = margin(self._streamed / len(self._pairs)) if by_value else policy.margin
        wanted = policy.wanted()
        missing = ~self.resident if wanted is None else ~self.resident & wanted.ravel()
        most = len(score) if self._unlimited else self.most
        self._unlimited = max(self._unlimited - 1, 0)
        order = ranked(score, missing)[:most]
        now = min(self.free, len(order))
        self._queue, self.left = order[:now].tolist(), now * self.copy_seconds
        self.free -= now
        self.started += now
        self.unused[self._queue] = True
        self._leaving = exchange(score, order[now:], self.resident, least)[1].tolist()
        self.wasted += int(self.unused[self._leaving].sum())  # as the engine counts them

    def choose(
        self, layer: int, n: NDArray[np.float64], pair: float, streams: int
    ) -> NDArray[np.intp]:
        """The experts that a layer streams, highest key first; those worth it will stay."""
        value, offset = self._value[layer], layer * len(n)
        here = self.resident[offset : offset + len(n)]
        streamed, new, old = stream_and_keep(n, value, value + pair * n, here, streams)
        self._kept += zip((new + offset).tolist(), (old + offset).tolist(), strict=True)
        self._pairs[layer] = n
        self.kept += len(new)
        return streamed

    def under_way(self) -> NDArray[np.intp]:
        return np.array(self._queue + self._arrived, dtype=np.intp)

    def run(self, seconds: float) -> None:
        self.left = max(self.left - seconds, 0.0)
        waiting = math.ceil(self.left / self.copy_seconds - 1e-9) if self.left else 0
        ended = len(self._queue) - min(waiting, len(self._queue))
        self._arrived += self._queue[:ended]
        del self._queue[:ended]

    def link_seconds(self, streamed: ArrayLike) -> NDArray[np.float64]:
        alone = self.cost.stream(streamed)
        slower, rest = self._sharing()
        ends = self.left / rest  # of the copies, if they have only that part of the link
        shared = alone * slower
        after = np.maximum(1 - ends / np.maximum(shared, 1e-30), 0.0)
        return np.where(shared <= ends, shared, ends + after * alone)

    def stream(self, streamed: int) -> float:
        took, (_, rest) = float(self.link_seconds(streamed)), self._sharing()
        self._streamed += streamed
        beside = min(took, self.left / rest)
        self.run(beside * rest)
        return took

    def _sharing(self) -> tuple[float, float]:
        """Beside copies: how many times longer a stream takes, what part of the link is left."""
        alone, link = float(self.cost.stream(1)), self.copy_seconds
        shared = max(alone, 2 * link)
        return shared / alone, 1 - link / shared
