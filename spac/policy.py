"""Which experts deserve a slot: one small interface, used by the replay simulator and the engine.

A policy sees the routing of every verify window and answers with a score per expert. Whoever moves
experts copies the missing ones in descending score and evicts residents in ascending score, as long
as a newcomer beats its victim by more than `margin`. Numpy only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spac import utility as estimator

Floats = NDArray[np.float64]


class Policy:
    """Base: keeps `state` [L, E] arrays, one transition per layer and window.

    observe(layer, ids [W, k]) is called when a layer's routing is known, and changes the score of
    that layer at once; end_window(accepted) then redoes the transitions with rejected rows counted
    `rejected_weight` times. Subclasses give `names` of their state and `_advance`.
    """

    names: tuple[str, ...] = ()
    margin = 0.0
    foresight = False  # True: `prepare` must be told the future
    pair = 1.0  # what a pair of the present window adds to a value (`spac.keep`)

    def __init__(
        self, num_layers: int, num_experts: int, slots: int, rejected_weight: float = 1.0
    ) -> None:
        self.shape = (num_layers, num_experts)
        self.slots, self.rejected_weight = slots, rejected_weight
        self.window = 0
        self.state = {name: np.zeros(self.shape) for name in self.names}
        self._seen: list[tuple[int, NDArray[np.integer], dict[str, Floats]]] = []

    def prepare(self, counts: Floats) -> None:
        """Be told the pairs [windows, L, E] of the whole run (policies with `foresight` only)."""

    def observe(self, layer: int, ids: ArrayLike) -> None:
        """Routing ids [W, k] of one layer in the current window."""
        rows = np.asarray(ids)
        self._seen.append((layer, rows, {n: a[layer].copy() for n, a in self.state.items()}))
        self._advance(layer, estimator.pair_counts(rows, self.shape[1]))

    def end_window(self, accepted: int | None = None) -> None:
        """The window is over; rows 0..accepted were kept (all, if None)."""
        for layer, rows, before in self._seen:
            if accepted is None or accepted >= len(rows) - 1 or self.rejected_weight == 1:
                continue
            weight = np.where(np.arange(len(rows)) <= accepted, 1.0, self.rejected_weight)
            for name, row in before.items():
                self.state[name][layer] = row
            self._advance(layer, estimator.pair_counts(rows, self.shape[1], weight))
        self._seen.clear()
        self.window += 1
        self._finish()

    def observe_counts(self, n: ArrayLike) -> None:
        """A whole window at once: pairs n [L, E] of every layer, and the window is over.

        What an engine does whose routing stays on the device; settling is done there as well.
        """
        for layer, row in enumerate(np.asarray(n, dtype=float)):
            self._advance(layer, row)
        self.window += 1
        self._finish()

    def warm_start(self, rate: Floats, windows: int = 16) -> None:
        """Begin as if `windows` windows with the pairs rate [L, E] of a profile had passed. Who
        knows the future goes by the place in it, and needs none."""
        for _ in range(0 if self.foresight else windows):
            self.observe_counts(rate)

    def score(self) -> Floats:
        """Priority [L, E]: higher is fetched first and evicted last."""
        raise NotImplementedError

    def value(self) -> Floats:
        """What the slot of an expert is worth [L, E], in pairs of a window (`spac.keep`): here its
        rank in the layer, less than one pair, so that what a window used stays."""
        order = self.score().argsort(axis=1, kind="stable")
        return order.argsort(axis=1) / self.shape[1]

    def wanted(self) -> NDArray[np.bool_] | None:
        """Experts [L, E] worth a copy at all; None means every one."""
        return None

    def _advance(self, layer: int, n: Floats) -> None:
        raise NotImplementedError

    def _finish(self) -> None:
        """Work once a window."""


class LRU(Policy):
    """Least recently used, by window and layer."""

    names = ("last",)

    def _advance(self, layer: int, n: Floats) -> None:
        self.state["last"][layer, n > 0] = self.window + 1 + layer / self.shape[0]

    def score(self) -> Floats:
        return self.state["last"]


class LFU(Policy):
    """Most pairs since the start."""

    names = ("count",)

    def _advance(self, layer: int, n: Floats) -> None:
        self.state["count"][layer] += n

    def score(self) -> Floats:
        return self.state["count"]


class LFRU(Policy):
    """Frequency divided by age: pairs since the start / windows since the last use."""

    names = ("count", "last")

    def _advance(self, layer: int, n: Floats) -> None:
        self.state["count"][layer] += n
        self.state["last"][layer, n > 0] = self.window + 1

    def score(self) -> Floats:
        return self.state["count"] / (self.window + 2 - self.state["last"])


class HybriScore(Policy):
    """HybriMoE's idea of a cache score: an average over windows of each expert's share of the
    routing (here of its pairs, since traces hold no router probabilities)."""

    names = ("share",)

    def _advance(self, layer: int, n: Floats) -> None:
        self.state["share"][layer] += 0.3 * (n / max(n.sum(), 1) - self.state["share"][layer])

    def score(self) -> Floats:
        return self.state["share"]


class Static(Policy):
    """The most used experts of the whole run, never changed: hindsight, no adaptation."""

    foresight = True
    pair = 0.0

    def prepare(self, counts: Floats) -> None:
        self._score = (counts > 0).sum(axis=0) + 1e-6 * counts.sum(axis=0)

    def warm_start(self, rate: Floats, windows: int = 16) -> None:
        self._score = rate

    def _advance(self, layer: int, n: Floats) -> None:
        pass

    def score(self) -> Floats:
        return self._score


class DemandBelady(Policy):
    """Fetches only what the last window used, keeps what is needed soonest (knows the future)."""

    foresight = True
    pair = 0.0
    names = ("used",)

    def prepare(self, counts: Floats) -> None:
        nearest = np.full(self.shape, np.inf)
        self._next = np.empty((len(counts) + 1, *self.shape))
        for w in range(len(counts), -1, -1):
            self._next[w] = nearest
            nearest = np.where(counts[w - 1] > 0, 1.0, nearest + 1) if w else nearest

    def _advance(self, layer: int, n: Floats) -> None:
        self.state["used"][layer] = n

    def score(self) -> Floats:
        return 1 / self._next[self.window]

    def value(self) -> Floats:
        return 1 / self._next[min(self.window + 1, len(self._next) - 1)]

    def wanted(self) -> NDArray[np.bool_]:
        return self.state["used"] > 0


class PrefetchOracle(Policy):
    """Knows the future and fetches ahead of it: score = sum of discount^d over the windows d
    ahead that use the expert. No one discount is best for every bandwidth; the bound is the best
    over `DISCOUNTS` (see `spac.replay.oracle_bound`)."""

    foresight = True
    pair = 0.0
    DISCOUNTS = (0.2, 0.45, 0.7, 0.9)
    discount = 0.45

    def prepare(self, counts: Floats) -> None:
        self._future = np.zeros((len(counts) + 1, *self.shape))
        for w in range(len(counts) - 1, -1, -1):
            use = (counts[w] > 0) + 0.02 * counts[w]
            self._future[w] = use + self.discount * self._future[w + 1]
        self._score = self._future[0].copy()

    def _advance(self, layer: int, n: Floats) -> None:
        self._score[layer] = self._future[min(self.window + 1, len(self._future) - 1), layer]

    def score(self) -> Floats:
        return self._score

    def value(self) -> Floats:
        return self._future[min(self.window + 1, len(self._future) - 1)]


class Spac(Policy):
    """The paper's utility as sensor; mode "reference" or "calibrated".

    reference: released bounds; score = utility, ties broken by the share of the pairs.
    calibrated (ours): the bounds follow the slots (`Calibrator`), and the score is the share of its
    layer's pairs that an expert had, older pairs counting less. A copy takes the link from what
    streams, so a newcomer must win by a margin. Constants chosen on the development traces
    (docs/method.md).
    """

    names = ("utility", "count", "pairs")
    MEMORY = 12.0  # pairs of a layer per expert, after which the oldest count 1 / e
    MARGIN = 0.008  # of the layer's pairs
    USUAL = 0.125  # pairs that an expert of the mean share is worth

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        slots: int,
        rejected_weight: float = 1.0,
        mode: str = "calibrated",
    ) -> None:
        super().__init__(num_layers, num_experts, slots, rejected_weight)
        self.mode = mode
        self.margin = self.MARGIN if mode == "calibrated" else 0.0
        self.calibrator = estimator.Calibrator(num_layers, mode)
        self.tau = np.ones(num_layers, dtype=np.int32)
        self.quota = np.full(num_layers, slots / num_layers)
        self._window_pairs = 0.0

    @property
    def utility(self) -> NDArray[np.int32]:
        """u [L, E]."""
        return self.state["utility"].astype(np.int32)

    @property
    def share(self) -> Floats:
        """Of the layer's pairs, by expert [L, E]; older pairs count less."""
        return self.state["count"] / np.maximum(self.state["pairs"], 1e-9)

    @property
    def expected(self) -> Floats:
        """Pairs expected of each expert in a window like the last [L, E]."""
        return self.share * self._window_pairs

    def observe_counts(self, n: ArrayLike) -> None:
        # All layers in one step: this runs beside the thread that decodes, under the same lock.
        self._advance(slice(None), np.asarray(n, dtype=float))
        self.window += 1
        self._finish()

    def _advance(self, layer: int | slice, n: Floats) -> None:
        bounds = self.calibrator.bounds[layer]
        up, down = bounds[..., :1], bounds[..., 1:]
        u = self.state["utility"]
        u[layer] = estimator.step(u[layer].astype(np.int32), n, up, down)
        pairs = n.sum(axis=-1, keepdims=True)
        decay = np.exp(-pairs / (self.MEMORY * self.shape[1]))
        for name, new in (("count", n), ("pairs", pairs)):
            self.state[name][layer] = decay * self.state[name][layer] + new
        self._window_pairs = float(pairs.mean())

    def _finish(self) -> None:
        self.calibrator.update(self.utility, self.tau, self.quota)

    def score(self) -> Floats:
        return self.share + (self.state["utility"] if self.mode == "reference" else 0.0)

    def value(self) -> Floats:
        if self.mode == "reference":
            return super().value()
        return self.USUAL * self.shape[1] * self.score()


class ActivationAware(Spac):
    """Spac plus what earlier layers of the same window say about later ones (MoE-Infinity's idea).

    Counts online how often expert e' of layer l + `AHEAD` follows expert e of layer l for the same
    token; the excess over e's own frequency, summed over the window, is added to the score. Needs
    scores that are read in the middle of a window; costs [L, E, E] floats.
    """

    AHEAD = 3  # layers: about the time that a copy takes
    WEIGHT = 1.0
    MARGIN = 0.006

    def __init__(
        self, num_layers: int, num_experts: int, slots: int, rejected_weight: float = 1.0
    ) -> None:
        super().__init__(num_layers, num_experts, slots, rejected_weight)
        self._follows = np.zeros((num_layers, num_experts, num_experts), dtype=np.float32)
        self._count = np.zeros(self.shape)
        self._tokens = 0
        self._hint = np.zeros(self.shape)
        self._rows: dict[int, NDArray[np.float32]] = {}

    def observe(self, layer: int, ids: ArrayLike) -> None:
        super().observe(layer, ids)
        rows = np.asarray(ids)
        chosen = np.zeros((len(rows), self.shape[1]), dtype=np.float32)
        np.put_along_axis(chosen, rows.astype(np.int64), 1, axis=1)
        self._rows[layer], self._hint[layer] = chosen, 0
        later = layer + self.AHEAD
        if later < self.shape[0]:
            on = np.flatnonzero(chosen.any(axis=0))
            seen, usual = self._count[layer, on], self._count[later] / max(self._tokens, 1)
            excess = self._follows[later, on] - seen[:, None] * usual
            per_token = (chosen[:, on].sum(axis=0) / (seen + 3.0)) @ excess
            self._hint[later] = per_token / rows.shape[1] / rows.size  # a share of the pairs

    def _finish(self) -> None:
        super()._finish()
        for layer, chosen in self._rows.items():
            before = self._rows.get(layer - self.AHEAD)
            if before is not None:
                self._follows[layer] += before.T @ chosen
            self._count[layer] += chosen.sum(axis=0)
        self._tokens += len(next(iter(self._rows.values()), ()))
        self._rows.clear()

    def score(self) -> Floats:
        return super().score() + self.WEIGHT * self._hint


def _reference(layers: int, experts: int, slots: int, rejected_weight: float = 1.0) -> Spac:
    return Spac(layers, experts, slots, rejected_weight, mode="reference")


POLICIES: dict[str, Callable[..., Policy]] = {
    "spac": Spac,
    "spac-reference": _reference,
    "activation": ActivationAware,
    "lru": LRU,
    "lfu": LFU,
    "lfru": LFRU,
    "hybri": HybriScore,
    "static": Static,
    "belady": DemandBelady,
    "oracle": PrefetchOracle,
}


def make_policy(
    name: str, num_layers: int, num_experts: int, slots: int, rejected_weight: float = 1.0
) -> Policy:
    """The policy called `name`, one of `POLICIES`."""
    if name not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, got {name!r}")
    return POLICIES[name](num_layers, num_experts, slots, rejected_weight)
