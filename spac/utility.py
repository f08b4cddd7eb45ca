"""Speculative Utility Estimator in numpy: the truth for the state machine of the verify kernel.

For one layer and one verify window, n[e] = pairs of expert e, and

    u[e] += 1 if n[e] - u[e] >= up;   u[e] -= 1 if u[e] - n[e] >= down;   clip to 0..K.

The state machine is the paper's (MoE-SpAc, arXiv 2603.09983, released constants up=5, down=1). The
`Calibrator`, which moves the bounds with the slots that a layer can have, is ours.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_UTILITY = 5
REFERENCE_BOUNDS = (5, 1)
START_BOUNDS = (2, 1)
# From loose (many hot experts) to strict. `down` > 1 makes low utilities stick, so it comes first;
# on 9-token windows of real traces `up` beyond 5 never fires.
LADDER = ((1, 3), (1, 2), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1))


def pair_counts(
    ids: ArrayLike, num_experts: int, row_weight: ArrayLike | None = None
) -> NDArray[np.float64]:
    """n [E] = pairs per expert of ids [W, k]; row_weight [W] counts a row as that many pairs.

    Ids outside 0..E-1 (-1, the expert-parallel sentinel) count nothing.
    """
    flat = np.asarray(ids, dtype=np.int64)
    weight = np.ones(flat.shape) if row_weight is None else np.asarray(row_weight, dtype=float)
    if row_weight is not None:
        weight = np.broadcast_to(weight.reshape(-1, *[1] * (flat.ndim - 1)), flat.shape)
    valid = (flat >= 0) & (flat < num_experts)
    n = np.bincount(flat[valid], weights=weight[valid], minlength=num_experts)
    return n.astype(np.float64)


def step(
    utility: NDArray[np.integer],
    n: ArrayLike,
    up: ArrayLike,
    down: ArrayLike,
    max_utility: int = MAX_UTILITY,
) -> NDArray[np.int32]:
    """One transition for utility [..., E] given n [..., E]; up and down broadcast against it."""
    u = np.asarray(utility)
    count = np.asarray(n)
    change = (count - u >= up).astype(np.int32) - (u - count >= down).astype(np.int32)
    return np.clip(u + change, 0, max_utility).astype(np.int32)


def update(
    utility: NDArray[np.integer],
    ids: ArrayLike,
    up: int,
    down: int,
    max_utility: int = MAX_UTILITY,
) -> NDArray[np.int32]:
    """Utility int32 [E] of one layer after the window ids [W, k]; the input is left alone."""
    return step(utility, pair_counts(ids, len(utility)), up, down, max_utility)


def settle(
    before: NDArray[np.integer],
    ids: ArrayLike,
    accepted: int,
    bounds: ArrayLike,
    rejected_weight: float = 1.0,
    max_utility: int = MAX_UTILITY,
) -> NDArray[np.int32]:
    """Utility int32 [L, E] after a window of which only rows 0..accepted were kept.

    before int32 [L, E] is the utility at the start of the window, ids [L, W, k], bounds [L, 2].
    A rejected row counts `rejected_weight` times; 1 is the paper, 0 forgets it.
    """
    rows = np.asarray(ids)
    weight = np.where(np.arange(rows.shape[1]) <= accepted, 1.0, rejected_weight)
    n = np.stack([pair_counts(layer, before.shape[1], weight) for layer in rows])
    b = np.asarray(bounds)
    return step(before, n, b[:, :1], b[:, 1:], max_utility)


class Calibrator:
    """Moves (up, down) per layer so that the hot experts fill the slots, neither more nor less.

    mode "reference" keeps the released (5, 1); "calibrated" starts at (2, 1) and walks `LADDER`,
    one rung at a time and only when the smoothed number of hot experts leaves
    [slots / band, slots * band], so that a layer does not swing between two rungs.
    """

    def __init__(
        self,
        num_layers: int,
        mode: str = "calibrated",
        band: float = 1.5,
        smoothing: float = 0.25,
        patience: int = 4,
    ) -> None:
        if mode not in ("reference", "calibrated"):
            raise ValueError(f"mode: expected 'reference' or 'calibrated', got {mode!r}")
        self.mode = mode
        self.bounds = np.empty((num_layers, 2), dtype=np.int32)  # (up, down) of each layer
        self.bounds[:] = REFERENCE_BOUNDS if mode == "reference" else START_BOUNDS
        self._rung = np.full(num_layers, LADDER.index(START_BOUNDS))
        self._hot = np.full(num_layers, np.nan)
        self._wait = np.full(num_layers, patience)
        self._band, self._smoothing, self._patience = band, smoothing, patience

    def update(self, utility: NDArray[np.integer], tau: ArrayLike, slots: ArrayLike) -> bool:
        """Look at utility [L, E] once a window; tau [L], slots [L]. True if `bounds` changed.

        The array `bounds` keeps its identity, so a device copy can be refreshed from it.
        """
        if self.mode == "reference":
            return False
        hot = (np.asarray(utility) >= np.asarray(tau)[:, None]).sum(axis=1)
        room = np.maximum(np.asarray(slots, dtype=float), 1.0)
        smooth = self._hot + self._smoothing * (hot - self._hot)
        self._hot = np.where(np.isnan(self._hot), hot, smooth)
        self._wait = np.maximum(self._wait - 1, 0)
        move = (self._hot > room * self._band).astype(int) - (self._hot * self._band < room)
        rung = np.clip(self._rung + np.where(self._wait == 0, move, 0), 0, len(LADDER) - 1)
        moved = rung != self._rung
        self._wait[moved] = self._patience
        self._hot[moved] = np.nan  # the old average says nothing about the new rung
        self._rung = rung
        self.bounds[moved] = np.array(LADDER, dtype=np.int32)[rung[moved]]
        return bool(moved.any())
