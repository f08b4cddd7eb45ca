"""What the engine decides between windows: bounds, thresholds and the order of experts.

Runs on the copy thread, off the critical path, on a snapshot of the utility buffer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spac import keep
from spac.balance import BalanceProblem, BalancerThread, Plan
from spac.config import SpacConfig
from spac.cost import CostModel
from spac.policy import Spac, make_policy
from spac.profile import Profile
from spac.split import Split, Work

_CATCH_UP = (
    64  # windows: of those that went by during one long round of copies, at most so many count
)


@dataclass(frozen=True)
class Snapshot:
    """The device buffers as they stood when a window began."""

    window: int  # how many windows have begun
    seconds: float  # time.perf_counter() then
    utility: np.ndarray  # int32 [L, E]
    frequency: np.ndarray  # int64 [L, E], pairs since attach
    prompt: np.ndarray | None = None  # [L, E], pairs per window, if a prompt was read before it
    work: Work | None = None  # of the window before, if the worker's clock is known


@dataclass(frozen=True)
class Idle:
    """A draft has begun, after a window."""

    frequency: np.ndarray  # int64 [L, E], pairs since attach, at the window's end
    pairs: np.ndarray  # int64 [L, E], of the window
    until: float  # time.perf_counter() when the draft is expected to end


class Control:
    """Turns snapshots into scores [L, E], what is worth a copy, and utility bounds [L, 2]."""

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
        self.policy = make_policy(config.policy, num_layers, num_experts, slots)
        # The estimator runs on the device whatever decides the copies: it shows in the statistics.
        self.estimator = (
            self.policy if isinstance(self.policy, Spac) else Spac(num_layers, num_experts, slots)
        )
        self.bounds = self.estimator.calibrator.bounds.copy()  # replaced, never changed in place
        self.plan: Plan | None = None
        self.split: Split | None = None  # if the GPU reads missing experts itself
        self.prior: Profile | None = None  # what it began with
        self.keeps = False  # what windows stream stays where it is worth it (spac.keep)
        self.value: np.ndarray | None = None  # of the experts, for that; replaced, never changed
        self._scores: np.ndarray | None = None  # of the last round
        self._streamed = 0.0  # experts per layer and window, smoothed
        self.balancer = BalancerThread()
        self._expected = np.zeros((num_layers, num_experts))  # pairs per window, smoothed
        self._frequency = np.zeros((num_layers, num_experts), dtype=np.int64)
        self._window = 0
        self._seconds = 0.0
        self._window_seconds = 0.0  # smoothed wall time from one window to the next
        self._balanced = 0

    def warm_start(self, profile: Profile) -> None:
        """Begin with what an earlier run saw."""
        self.prior = profile
        self._begin_from(profile.rate)
        self.estimator.state["utility"][:] = profile.utility

    def _begin_from(self, rate: np.ndarray) -> None:
        """As if windows with the pairs rate [L, E] had passed."""
        self._expected[:] = rate
        for policy in {id(p): p for p in (self.policy, self.estimator)}.values():
            policy.warm_start(rate)
        self.bounds = self.estimator.calibrator.bounds.copy()

    def observe(self, snapshot: Snapshot, held: np.ndarray) -> None:
        """Take in the windows since the last snapshot; held: experts in slots or on their way."""
        if snapshot.prompt is not None:
            self._begin_from(snapshot.prompt)
        if self.split is not None and snapshot.work is not None:
            self.split.observe(snapshot.work)
            self._streamed += 0.2 * (float(snapshot.work.streamed.mean()) - self._streamed)
        passed = max(snapshot.window - self._window, 1)
        rate = (snapshot.frequency - self._frequency) / passed
        decay = 0.8**passed
        self._expected = decay * self._expected + (1 - decay) * rate
        took = (snapshot.seconds - self._seconds) / passed
        if self._window and snapshot.prompt is None:  # else between two texts
            self._window_seconds = decay * self._window_seconds + (1 - decay) * took
        self._frequency, self._window = snapshot.frequency, snapshot.window
        self._seconds = snapshot.seconds
        if snapshot.window - self._balanced >= self.config.rebalance_every:
            self._balanced = snapshot.window
            self.balancer.submit(self._problem(snapshot.utility, held))
        plan = self.balancer.poll()
        if plan is not None:
            self.plan, self.estimator.tau, self.estimator.quota = plan, plan.tau, plan.slots
        before = self.estimator.calibrator.bounds.copy()
        for policy in {id(p): p for p in (self.policy, self.estimator)}.values():
            for _ in range(min(passed, _CATCH_UP)):
                policy.observe_counts(rate)
        self.estimator.state["utility"][:] = snapshot.utility  # the device's is the one in force
        if not np.array_equal(before, self.estimator.calibrator.bounds):
            self.bounds = self.estimator.calibrator.bounds.copy()

    def scores(self) -> np.ndarray:
        """Priority of every expert, float [L, E]: first in from the top, first out below."""
        return self.policy.value() if self.keeps else self.policy.score()

    @property
    def margin(self) -> float:
        """By which a newcomer of a copy round must beat its victim."""
        return keep.margin(self._streamed) if self.keeps else self.policy.margin

    def appraise(self, scores: np.ndarray, held: np.ndarray, resident: np.ndarray) -> None:
        """Set `value` [L, E] after a round of copies. Experts that are on their way are
        not to be kept (-inf). Those that leave have left when a window sees it."""
        self._scores = scores
        value = scores.astype(np.float32)
        value[~resident & (held | ~self.wanted())] = -np.inf
        self.value = value

    def exchange(
        self, pairs: np.ndarray, held: np.ndarray, resident: np.ndarray, most: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """At most so many newcomers and their victims, flat indices: what is worth a copy over an
        idle link, after a window with `pairs` [L, E], by the scores of the last round."""
        if self._scores is None:
            nothing = np.empty(0, dtype=np.intp)
            return nothing, nothing
        key = self._scores + self.policy.pair * pairs
        new = keep.ranked(key, ~held & ~resident & self.wanted())[:most]
        return keep.exchange(key, new, held & resident)

    def wanted(self) -> np.ndarray:
        """Experts worth a copy, bool [L, E]; with the paper's policy those with u >= tau."""
        if self.config.policy == "spac-reference":
            return self.estimator.utility >= self.estimator.tau[:, None]
        wanted = self.policy.wanted()
        return np.ones_like(self._expected, dtype=bool) if wanted is None else wanted

    def _problem(self, utility: np.ndarray, held: np.ndarray) -> BalanceProblem:
        horizon = self.config.rebalance_every
        tokens = self._expected.sum() / (len(utility) * self.top_k)
        return BalanceProblem.build(
            utility=utility,
            counts=self._expected,
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
