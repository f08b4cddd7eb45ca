"""The balancer: how long a re-solve takes, and what its plans are worth on traces."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

from spac.balance import BalanceProblem, Balancer, Plan, make_plan, solve_dp
from spac.bench.arguments import fraction, positive
from spac.bench.replay import after_prompt, find_traces, shape_cost
from spac.bench.report import Table
from spac.config import SpacConfig
from spac.machine import MACHINES
from spac.policy import Spac
from spac.replay import make_windows, replay

NAME = "balance"
HELP = "balancer: re-solve time by size, and what its thresholds buy on traces"
SIZES = ((48, 128), (94, 128))  # layers, experts: Qwen3-30B-A3B, Qwen3-235B-A22B


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m spac.bench balance`."""
    parser.add_argument("--traces", nargs="+", help="compare thresholds on these traces instead")
    parser.add_argument("--profile", default="rtx4090", choices=tuple(MACHINES))
    parser.add_argument("--cache", type=fraction, default=0.17)
    parser.add_argument("--window", type=positive, default=9)
    parser.add_argument("--acceptance", type=fraction, default=0.7)


def run(args: argparse.Namespace) -> Table:
    """Solve times, or with --traces the ablation of the thresholds."""
    return ablation(args) if args.traces else solve_times(args.repeats)


def made_up_problem(
    rng: np.random.Generator, layers: int, experts: int, share: float = 0.17, copies: int = 200
) -> BalanceProblem:
    """A programme from a made-up state: Zipf counts, utility and residency that follow them."""
    zipf = 40.0 / np.arange(1, experts + 1)
    counts = np.stack([rng.permutation(zipf) for _ in range(layers)]).clip(max=8)
    utility = np.minimum(rng.poisson(counts), 5)
    resident = rng.random((layers, experts)) < share * (utility + 0.5)
    cost = MACHINES["h200"].cost(9_437_184, 9_437_184)
    pool = int(share * layers * experts)
    window = float(copies) * cost.expert_bytes
    return BalanceProblem.build(utility, counts, resident, cost, pool, window, tokens=9)


def solve_times(solves: int) -> Table:
    """Milliseconds of `Balancer.solve`, over programmes with scarce to ample bandwidth."""
    rows: list[list[Any]] = []
    for layers, experts in SIZES:
        rng, balancer = np.random.default_rng(0), Balancer()
        problems = [
            made_up_problem(rng, layers, experts, copies=int(c))
            for c in np.linspace(0.4, 8, solves) * layers
        ]
        start = time.perf_counter()
        balancer.solve(problems[0])
        first = time.perf_counter() - start
        plans = [balancer.solve(p) for p in problems]
        seconds = sorted(p.seconds for p in plans if p is not None)
        gaps = [_gap(problems[i], plans[i]) for i in range(0, solves, max(solves // 4, 1))]
        rows.append(
            [f"{layers} x {experts} x 6", solves, statistics.median(seconds) * 1e3,
             seconds[int(0.95 * (len(seconds) - 1))] * 1e3, seconds[-1] * 1e3, first * 1e3,
             max(gaps), balancer.failed + balancer.late]
        )  # fmt: skip
    columns = ["layers x experts x thresholds", "solves", "median ms", "p95 ms", "max ms"]
    columns += ["first ms", "worst gap to DP", "failed"]
    notes = ["first: imports cvxpy and canonicalises; gap asked for: 1e-3 relative"]
    return Table(columns, rows, "Balancer: time of a re-solve", notes)


def _gap(problem: BalanceProblem, plan: Plan | None) -> float:
    best = solve_dp(problem)
    return plan.objective / best.objective - 1 if plan and best else float("nan")


class ConstantBalancer(Balancer):
    """One threshold for all layers, the best that fits, as an ablation."""

    def solve(self, problem: BalanceProblem) -> Plan | None:
        layers, T = problem.gpu.shape
        choices = [np.full(layers, t, dtype=np.intp) for t in range(T)]
        fit = [c for c in choices if problem.feasible(c)]
        if not fit:
            return None
        return make_plan(problem, min(fit, key=lambda c: problem.usage(c)[0]), 0.0, "optimal")


class EqualBalancer(Balancer):
    """Per layer the lowest threshold whose hot experts fit an equal share of the pool."""

    def solve(self, problem: BalanceProblem) -> Plan | None:
        fits = problem.slots <= problem.pool / len(problem.slots)
        return make_plan(problem, fits.argmax(axis=1), 0.0, "optimal")


class NoBalancer(Balancer):
    """Never a plan: thresholds and quotas stay as they began."""

    def solve(self, problem: BalanceProblem) -> Plan | None:
        return None


THRESHOLDS = {
    "programme": Balancer,
    "one": ConstantBalancer,
    "equal": EqualBalancer,
    "none": NoBalancer,
}


class GatedSpac(Spac):
    """Spac that copies only hot experts: u >= tau."""

    def wanted(self) -> np.ndarray:
        return self.utility >= self.tau[:, None]


def ablation(args: argparse.Namespace) -> Table:
    """Predicted tokens/s with hot experts only, thresholds chosen in four ways, and without; from
    a prompt of 32 tokens (or a quarter of the trace) on, copies and streams as in the engine."""
    columns = ["trace", "order only", "tau = 1", "one threshold", "equal quotas", "programme"]
    rows: list[list[Any]] = []
    for name, trace in find_traces(args.traces):
        _, layers, _ = trace.shape
        cost = shape_cost(name, args.profile, None, None)
        slots = int(args.cache * layers * trace.num_experts)
        rate, text = after_prompt(trace, 32)
        windows = make_windows(text, args.window - 1, args.acceptance)
        options: dict[str, Any] = {"streaming": True, "max_copies": SpacConfig.max_copies}
        options |= {"prompt": rate * args.window, "warmup": 0.0}
        row: list[Any] = [name]
        ways: list[tuple[type[Spac], Balancer | None]] = [(Spac, None), (GatedSpac, None)]
        ways += [(GatedSpac, b) for b in (ConstantBalancer(), EqualBalancer(), Balancer())]
        for kind, balancer in ways:
            policy = kind(layers, trace.num_experts, slots)
            result = replay(windows, policy, cost, slots, balancer=balancer, **options)
            row.append(result.tokens_per_second)
        rows.append(row)
    title = f"Predicted tokens/s by threshold, {args.profile}, cache {args.cache:g}"
    return Table(columns, rows, title, ["order only: any missing expert may be copied"])
