"""Heterogeneous Workload Balancer: the integer programme that picks a threshold per layer.

For layer l and threshold t in 1..K+1 the *hot* experts (u >= t) run on the GPU, the others on the
CPU; K+1 means that nothing is hot. Given slots(l, t), seconds gpu(l, t), cpu(l, t), h2d(l, t) and
new bytes(l, t),

    minimise    sum_l m_l + price * sum_{l,t} bytes(l, t) z(l, t)
    subject to  m_l >= sum_t gpu(l, t) z(l, t),  the same with cpu and with h2d,
                sum_t z(l, t) = 1 for every l,   z binary,
                sum slots(l, t) z(l, t) <= pool,  sum bytes(l, t) z(l, t) <= byte window.

One z(l, t) of a layer is 1, so at the optimum m_l is the largest of the three for that t. The
programme is therefore given to HiGHS with the coefficients c(l, t) = max(gpu, cpu, h2d) + price *
bytes and without m: the same integer optimum, a far tighter relaxation.

The programme's form is ours; the paper describes the idea, its code has none (see docs/method.md).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spac.cost import CostModel
from spac.utility import MAX_UTILITY

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class BalanceProblem:
    """Data of one programme; every array is [L, T], column t - 1 for threshold t of 1..T."""

    gpu: Floats  # seconds
    cpu: Floats  # seconds
    h2d: Floats  # seconds of streaming, per window
    slots: Floats  # hot experts
    new_bytes: Floats  # hot experts that are not resident yet
    pool: float  # slots
    byte_window: float  # bytes that may be copied before the next plan
    price: float = 0.0  # seconds of decoding that one copied byte may cost (lambda)
    num_experts: int = 1 << 30  # of a layer: the most slots that it can use

    def __post_init__(self) -> None:
        for name in ("gpu", "cpu", "h2d", "slots", "new_bytes"):
            a = getattr(self, name)
            if a.ndim != 2 or a.shape != self.gpu.shape or a.size == 0:
                raise ValueError(f"{name}: needed [layers, thresholds] like gpu, got {a.shape}")
            if not (np.isfinite(a).all() and (a >= 0).all()):
                raise ValueError(f"{name}: needed finite values of at least 0")
        for name in ("pool", "byte_window", "price"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: needed a finite number, got {getattr(self, name)}")

    @property
    def cost(self) -> Floats:
        """c(l, t), seconds."""
        sides = np.maximum(np.maximum(self.gpu, self.cpu), self.h2d)
        return sides + self.price * self.new_bytes

    def usage(self, choice: NDArray[np.intp]) -> tuple[float, float, float]:
        """(objective, slots, bytes) of one column per layer."""
        rows = np.arange(len(choice))
        c, s, b = (float(a[rows, choice].sum()) for a in (self.cost, self.slots, self.new_bytes))
        return c, s, b

    def feasible(self, choice: NDArray[np.intp]) -> bool:
        _, slots, moved = self.usage(choice)
        return slots <= self.pool and moved <= self.byte_window

    @staticmethod
    def build(
        utility: ArrayLike,
        counts: ArrayLike,
        resident: ArrayLike,
        cost: CostModel,
        pool: int,
        byte_window: float,
        tokens: int,
        horizon: int = 1,
        transfer_weight: float = 0.1,
        max_utility: int = MAX_UTILITY,
    ) -> BalanceProblem:
        """From the engine's state: utility [L, E], residency bool [L, E], counts [L, E] = pairs
        expected of each expert in a window of `tokens`.

        `horizon` windows pass until the next plan: a byte streamed once is spread over them.
        `transfer_weight` is lambda as the share of a copy's time that hurts decoding.
        """
        u, n = np.asarray(utility), np.asarray(counts, dtype=float)
        here = np.asarray(resident, dtype=bool)
        used = 1 - (1 - np.clip(n / tokens, 0, 1)) ** tokens  # chance that a window needs it
        hot = u[:, :, None] >= np.arange(1, max_utility + 2)  # [L, E, T]

        def total(value: Floats, mask: NDArray[np.bool_]) -> Floats:
            return np.einsum("le,let->lt", value, mask)

        new = hot & ~here[:, :, None]
        return BalanceProblem(
            gpu=cost.gpu(total(used, hot), total(n, hot)),
            cpu=cost.cpu(total(used, ~hot), total(n, ~hot)),
            h2d=cost.h2d(total(used, new)) / max(horizon, 1),
            slots=hot.sum(axis=1).astype(float),
            new_bytes=new.sum(axis=1) * float(cost.expert_bytes),
            pool=pool,
            byte_window=byte_window,
            price=transfer_weight * cost.h2d_byte,
            num_experts=u.shape[1],
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """Thresholds in force: what is hot, and how many slots each layer should hold."""

    tau: NDArray[np.int32]  # [L], 1..T
    slots: NDArray[np.int32]  # [L], sums to at most the pool
    objective: float  # seconds
    seconds: float  # that the solve took
    status: str  # "optimal", or "bounded": rounded relaxation within the gap asked for


def make_plan(problem: BalanceProblem, choice: NDArray[np.intp], seconds: float, how: str) -> Plan:
    """Plan of one column per layer; slots that its hot experts leave free go to the layers whose
    next lower threshold saves most seconds a slot, then round robin."""
    rows = np.arange(len(choice))
    quota = problem.slots[rows, choice].astype(np.int64)
    left = max(int(problem.pool) - int(quota.sum()), 0)
    at = choice.copy()
    while left and (at > 0).any():
        lower = np.maximum(at - 1, 0)
        room = np.maximum(problem.slots[rows, lower] - problem.slots[rows, at], 0)
        saved = problem.cost[rows, at] - problem.cost[rows, lower]
        worth = np.where(at > 0, saved / np.maximum(room, 1e-9), -np.inf)
        layer = int(worth.argmax())
        give = min(left, int(room[layer]))
        quota[layer] += give
        left -= give
        at[layer] -= 1
    for layer in itertools.cycle(range(len(quota))):
        if not left or (quota >= problem.num_experts).all():
            break
        if quota[layer] < problem.num_experts:
            quota[layer] += 1
            left -= 1
    return Plan(
        (choice + 1).astype(np.int32),
        quota.astype(np.int32),
        problem.usage(choice)[0],
        seconds,
        how,
    )


def improve(problem: BalanceProblem, choice: NDArray[np.intp]) -> NDArray[np.intp]:
    """Local search from a feasible choice: best change of one layer, else of two, a few times."""
    choice, cost = choice.copy(), problem.cost
    rows, T = np.arange(len(choice)), cost.shape[1]
    layer = np.repeat(rows, T)
    for _ in range(12):
        while True:
            gain = cost - cost[rows, choice][:, None]
            slots = problem.slots - problem.slots[rows, choice][:, None]
            moved = problem.new_bytes - problem.new_bytes[rows, choice][:, None]
            _, used_slots, used_bytes = problem.usage(choice)
            room = (problem.pool - used_slots, problem.byte_window - used_bytes)
            fits = (gain < -1e-12) & (slots <= room[0]) & (moved <= room[1])
            if not fits.any():
                break
            best = int(np.where(fits, gain, 0).argmin())
            choice[best // T] = best % T
        g, s, b = gain.ravel(), slots.ravel(), moved.ravel()
        both = g[:, None] + g
        fits = (both < -1e-12) & (s[:, None] + s <= room[0]) & (b[:, None] + b <= room[1])
        fits &= layer[:, None] != layer
        if not fits.any():
            break
        for best in divmod(int(np.where(fits, both, 0).argmin()), len(g)):
            choice[best // T] = best % T
    return choice


class _Programme:
    """The cvxpy problems of one shape, canonicalised once; parameters carry the data (DPP)."""

    def __init__(self, shape: tuple[int, int]) -> None:
        import cvxpy as cp

        self.cost = cp.Parameter(shape)
        self.slots = cp.Parameter(shape, nonneg=True)
        self.bytes = cp.Parameter(shape, nonneg=True)
        self.pool, self.window = cp.Parameter(), cp.Parameter()
        self.allowed = cp.Parameter(shape, nonneg=True)
        self.share = cp.Variable(shape, nonneg=True)
        self.z = cp.Variable(shape, boolean=True)
        self.relaxed = cp.Problem(*self._form(cp, self.share))
        objective, constraints = self._form(cp, self.z)
        self.integer = cp.Problem(objective, [*constraints, self.z <= self.allowed])

    def _form(self, cp: Any, z: Any) -> tuple[Any, list[Any]]:
        return cp.Minimize(cp.sum(cp.multiply(self.cost, z))), [
            cp.sum(cp.multiply(self.slots, z)) <= self.pool,
            cp.sum(cp.multiply(self.bytes, z)) <= self.window,
            cp.sum(z, axis=1) == 1,
        ]


class Balancer:
    """Solves programmes of one shape again and again; a first solve also imports cvxpy.

    solve() returns None when there is nothing to put in force (infeasible, late, solver failed or
    not installed); the caller keeps its last plan. `solved`, `failed`, `late` count, `error` says
    why the last one failed. `gap` is the relative distance to the optimum that is good enough.
    """

    def __init__(self, time_limit: float = 1.0, gap: float = 1e-3) -> None:
        self.time_limit, self.gap = time_limit, gap
        self.solved = self.failed = self.late = 0
        self.error = ""
        self._programmes: dict[tuple[int, ...], _Programme] = {}

    def solve(self, problem: BalanceProblem) -> Plan | None:
        """A plan within `gap` of the optimum, or None; never raises for a solver's sake."""
        try:
            programme = self._programme(problem.gpu.shape)
            start = time.perf_counter()
            found = self._solve(programme, problem, start)
            if found is not None and not problem.feasible(found[0]):
                raise ValueError(f"the solver's plan breaks a constraint ({found[1]})")
        except Exception as e:  # a solver may raise anything; decoding goes on with the last plan
            self.failed += 1
            self.error = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
            return None
        seconds = time.perf_counter() - start
        if found is None or seconds > self.time_limit:
            late = seconds >= self.time_limit
            self.late += late
            self.failed += not late
            self.error = f"late: {seconds:.3f} s" if late else "infeasible"
            return None
        self.solved += 1
        return make_plan(problem, found[0], seconds, found[1])

    def _programme(self, shape: tuple[int, int]) -> _Programme:
        if shape not in self._programmes:
            self._programmes[shape] = _Programme(shape)
        return self._programmes[shape]

    def _solve(
        self, p: _Programme, problem: BalanceProblem, start: float
    ) -> tuple[NDArray[np.intp], str] | None:
        cost, rows = problem.cost, np.arange(len(problem.cost))
        unit = float(cost.mean()) or 1.0  # HiGHS's tolerances are absolute: bring numbers near 1
        expert = float(problem.new_bytes.max()) / 64 or 1.0
        p.cost.value, p.slots.value = cost / unit, problem.slots
        p.bytes.value = problem.new_bytes / expert
        p.pool.value, p.window.value = problem.pool, problem.byte_window / expert
        if not self._run(p.relaxed, start):
            return None
        # At most two layers are fractional. The strictest threshold they use takes fewest slots.
        T = cost.shape[1]
        choice = np.where(p.share.value > 1e-6, np.arange(T), -1).max(axis=1).astype(np.intp)
        if not problem.feasible(choice):
            choice = np.full(len(cost), T - 1)
        upper = math.inf
        if problem.feasible(choice):
            choice = improve(problem, choice)
            upper = problem.usage(choice)[0] / unit
        price = [max(float(c.dual_value), 0.0) for c in p.relaxed.constraints[:2]]
        reduced = p.cost.value + price[0] * p.slots.value + price[1] * p.bytes.value
        least = reduced.min(axis=1, keepdims=True)
        bound = least.sum() - price[0] * p.pool.value - price[1] * p.window.value
        if upper < math.inf and upper - bound <= self.gap * abs(upper):
            return choice, "bounded"
        # Lagrangian fixing: a threshold whose reduced cost exceeds the gap is in no better plan.
        p.allowed.value = (bound + reduced - least <= upper + 1e-9).astype(float)
        if not self._run(p.integer, start):
            return None
        best = p.z.value.argmax(axis=1)
        if problem.feasible(best) and cost[rows, best].sum() / unit <= upper:
            return best, "optimal"
        return (choice, "optimal") if upper < math.inf else None

    def _run(self, problem: Any, start: float) -> bool:
        left = self.time_limit - (time.perf_counter() - start)
        if left <= 0:
            return False
        problem.solve(solver="HIGHS", time_limit=left, mip_rel_gap=self.gap)
        return problem.status == "optimal"


class BalancerThread:
    """Solves in a daemon thread, from start() on. submit() and poll() return at once; only the
    newest counts."""

    def __init__(self, balancer: Balancer | None = None) -> None:
        self.balancer = balancer or Balancer()
        self._wake = threading.Condition()
        self._problem: BalanceProblem | None = None
        self._plan: Plan | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="spac-balancer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, problem: BalanceProblem) -> None:
        """Replace whatever waits to be solved."""
        with self._wake:
            self._problem = problem
            self._wake.notify()

    def poll(self) -> Plan | None:
        """The newest plan that no poll returned yet, or None."""
        with self._wake:
            plan, self._plan = self._plan, None
            return plan

    def close(self, timeout: float = 5.0) -> None:
        """Stop after the solve now running, if any."""
        with self._wake:
            self._closed, self._problem = True, None
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _work(self) -> None:
        with contextlib.suppress(ImportError):  # solve() reports it
            import cvxpy  # noqa: F401  seconds that the first solve need not wait for
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._problem is not None)
                if self._closed:
                    return
                problem, self._problem = self._problem, None
            assert problem is not None
            plan = self.balancer.solve(problem)
            if plan is not None:
                with self._wake:
                    self._plan = plan


def solve_dp(problem: BalanceProblem) -> Plan | None:
    """Exact oracle: dynamic programme over (slots, bytes); slots and bytes must be integers.

    Bytes count in their greatest common divisor; needs L * pool * (byte window / divisor) memory.
    None if infeasible.
    """
    start = time.perf_counter()
    slots = problem.slots.astype(np.int64)
    moved = problem.new_bytes.astype(np.int64)
    unit = int(np.gcd.reduce(moved, axis=None)) or 1
    moved //= unit
    S = min(math.floor(problem.pool), int(slots.max(axis=1).sum()))
    B = min(math.floor(problem.byte_window / unit), int(moved.max(axis=1).sum()))
    if S < 0 or B < 0:
        return None
    L, T = slots.shape
    best, pick = np.zeros((S + 1, B + 1)), np.zeros((L, S + 1, B + 1), dtype=np.uint8)
    for layer in range(L):
        now = np.full_like(best, np.inf)
        for t in range(T):
            s, b = slots[layer, t], moved[layer, t]
            if s > S or b > B:
                continue
            value = best[: S + 1 - s, : B + 1 - b] + problem.cost[layer, t]
            into = now[s:, b:]
            better = value < into
            into[better] = value[better]
            pick[layer, s:, b:][better] = t
        best = now
    if not np.isfinite(best[S, B]):
        return None
    choice, s, b = np.zeros(L, dtype=np.intp), S, B
    for layer in reversed(range(L)):
        choice[layer] = pick[layer, s, b]
        s -= slots[layer, choice[layer]]
        b -= moved[layer, choice[layer]]
    return make_plan(problem, choice, time.perf_counter() - start, "optimal")


def brute_force(problem: BalanceProblem) -> Plan | None:
    """The definition: try every combination of thresholds (small cases). None if infeasible."""
    start = time.perf_counter()
    L, T = problem.gpu.shape
    choices = [np.array(c, dtype=np.intp) for c in itertools.product(range(T), repeat=L)]
    best = min(filter(problem.feasible, choices), key=lambda c: problem.usage(c)[0], default=None)
    if best is None:
        return None
    return make_plan(problem, best, time.perf_counter() - start, "optimal")
