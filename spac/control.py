"""What the engine decides between windows: bounds, thresholds and the order of experts.

Runs on the copy thread, off the critical path, on a snapshot of the utility buffer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spac.balance import BalanceProblem, BalancerThread, Plan
from spac.config import SpacConfig
from spac.cost import CostModel
from spac.utility import Calibrator


@dataclass(frozen=True)
class Snapshot:
    """The device buffers as they stood when a window began."""

    window: int  # how many windows have begun
    seconds: float  # time.perf_counter() then
    utility: np.ndarray  # int32 [L, E]
    frequency: np.ndarray  # int64 [L, E], pairs since attach


class Control:
    """Turns snapshots into scores [L, E], thresholds tau [L] and utility bounds [L, 2]."""

    def __init__(
        self,
        config: SpacConfig,
        costs: CostModel,
        num_layers: int,
        num_experts: int,
        top_k: int,
        slots: int,
    ) -> None:
        self.config = config
        self.top_k = top_k
        self.costs = costs
        self.slots = slots
        self.tau = np.ones(num_layers, dtype=np.int32)
        self.quota = np.full(num_layers, slots / num_layers)
        self.expected = np.zeros((num_layers, num_experts))  # pairs per window, smoothed
        self.plan: Plan | None = None
        mode = "reference" if config.policy == "spac-reference" else "calibrated"
        self.calibrator = Calibrator(num_layers, mode)
        self.bounds = self.calibrator.bounds.copy()  # replaced, never changed in place
        self.balancer = BalancerThread()
        self._frequency = np.zeros((num_layers, num_experts), dtype=np.int64)
        self._window = 0
        self._seconds = 0.0
        self._window_seconds = 0.0  # smoothed wall time from one window to the next
        self._balanced = 0

    def scores(self, snapshot: Snapshot, held: np.ndarray) -> np.ndarray:
        """Priority of every expert, float [L, E]: first in from the top, first out below."""
        passed = max(snapshot.window - self._window, 1)
        rate = (snapshot.frequency - self._frequency) / passed
        decay = 0.8**passed
        self.expected = decay * self.expected + (1 - decay) * rate
        took = (snapshot.seconds - self._seconds) / passed
        if self._window:
            self._window_seconds = decay * self._window_seconds + (1 - decay) * took
        self._frequency, self._window = snapshot.frequency, snapshot.window
        self._seconds = snapshot.seconds
        if snapshot.window - self._balanced >= self.config.rebalance_every:
            self._balanced = snapshot.window
            self.balancer.submit(self._problem(snapshot.utility, held))
        plan = self.balancer.poll()
        if plan is not None:
            self.plan, self.tau, self.quota = plan, plan.tau, plan.slots
        if self.calibrator.update(snapshot.utility, self.tau, self.quota):
            self.bounds = self.calibrator.bounds.copy()
        # Equal utilities are ordered by how many pairs the expert had of late.
        return snapshot.utility + self.expected / (1 + self.expected)

    def _problem(self, utility: np.ndarray, held: np.ndarray) -> BalanceProblem:
        horizon = self.config.rebalance_every
        tokens = self.expected.sum() / (len(self.tau) * self.top_k)
        return BalanceProblem.build(
            utility=utility,
            counts=self.expected,
            resident=held,
            cost=self.costs,
            pool=self.slots,
            byte_window=horizon * self._window_seconds / max(self.costs.h2d_byte, 1e-15),
            tokens=max(round(tokens), 1),
            horizon=horizon,
            max_utility=self.config.max_utility,
        )

    def close(self) -> None:
        self.balancer.close()
