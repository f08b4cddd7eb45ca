import dataclasses
import importlib.util
import itertools
import statistics
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spac.balance import (
    BalanceProblem,
    Balancer,
    BalancerThread,
    brute_force,
    improve,
    solve_dp,
)
from spac.cost import CostModel

needs_solver = pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in ("cvxpy", "highspy")),
    reason="cvxpy and highspy are not installed",
)
COST = CostModel(
    expert_bytes=1000,
    gpu_launch=30e-6,
    gpu_expert=2.4e-6,
    gpu_pair=0.02e-6,
    cpu_launch=20e-6,
    cpu_expert=95e-6,
    cpu_pair=6e-6,
    h2d_latency=8e-6,
    h2d_byte=1e-7,
)


@st.composite
def problems(draw, layers, thresholds):
    """Tiny programmes with integer data; infeasible ones too."""

    def table(high):
        row = st.lists(st.integers(0, high), min_size=thresholds, max_size=thresholds)
        rows = draw(st.lists(row, min_size=layers, max_size=layers))
        return np.array(rows, dtype=float)

    return BalanceProblem(
        gpu=table(20),
        cpu=table(20),
        h2d=table(20),
        slots=table(6),
        new_bytes=table(4),
        pool=draw(st.integers(0, 5 * layers)),
        byte_window=draw(st.integers(0, 4 * layers)),
        price=draw(st.sampled_from([0.0, 0.5, 2.0])),
    )


def realistic(rng, L, E=128, pool_share=0.17, copies=200):
    """A programme built from a made-up state: Zipf counts, utility that follows them."""
    counts = np.stack([rng.permutation(40.0 / np.arange(1, E + 1)) for _ in range(L)]).clip(max=8)
    utility = np.minimum(rng.poisson(counts), 5)
    resident = rng.random((L, E)) < pool_share * (utility + 0.5)
    pool = int(pool_share * L * E)
    return BalanceProblem.build(utility, counts, resident, COST, pool, copies * 1000, tokens=9)


PATIENT = 60.0  # seconds: on a busy machine a solve may have to wait for a core
SHAPES = {(2, 2): 200, (3, 3): 400, (2, 6): 200, (4, 3): 200}  # 1,000 instances


@needs_solver
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_solver_and_dp_equal_brute_force(shape):
    balancer = Balancer(PATIENT, gap=0.0)

    @settings(max_examples=SHAPES[shape], deadline=None)
    @given(problems(*shape))
    def check(problem):
        truth, dp, plan = brute_force(problem), solve_dp(problem), balancer.solve(problem)
        assert (truth is None) == (dp is None) == (plan is None)
        if truth is None:
            return
        assert dp.objective == pytest.approx(truth.objective, abs=1e-9)
        assert plan.objective == pytest.approx(truth.objective, rel=1e-6, abs=1e-9)
        for p in (truth, dp, plan):
            choice = p.tau - 1
            assert problem.feasible(choice) and p.slots.sum() <= problem.pool
            assert (p.slots >= problem.slots[np.arange(len(choice)), choice]).all()
            assert problem.usage(choice)[0] == pytest.approx(p.objective)

    check()
    assert balancer.late == 0


@needs_solver
def test_equals_dp_on_realistic_programmes():
    rng, balancer = np.random.default_rng(1), Balancer(PATIENT, gap=0.0)
    for pool, copies in itertools.product((0.08, 0.33), (5, 60)):
        problem = realistic(rng, 12, 64, pool, copies)
        dp, plan = solve_dp(problem), balancer.solve(problem)
        assert plan.objective == pytest.approx(dp.objective, rel=1e-6)


@needs_solver
def test_gap_is_honoured_and_resolves_are_fast():
    """Median re-solve of 48 layers x 6 thresholds, in time of the processor, which other processes
    take no part of; a slow one may need four times 20 ms."""
    rng, balancer = np.random.default_rng(2), Balancer(PATIENT)
    seconds = []
    for copies in np.linspace(20, 400, 15):
        problem = realistic(rng, 48, copies=int(copies))
        start = time.process_time()
        plan = balancer.solve(problem)
        seconds.append(time.process_time() - start)
        if len(seconds) % 5 == 1:
            best = solve_dp(problem).objective
            assert best - 1e-12 <= plan.objective <= best * (1 + 1.01e-3)
    assert balancer.solved == 15 and balancer.late == balancer.failed == 0
    assert statistics.median(seconds) < 0.08


def test_m_is_the_slowest_side():
    one = np.ones((1, 2))
    p = BalanceProblem(3 * one, one, 2 * one, one, 4 * one, pool=1, byte_window=9, price=0.5)
    assert (p.cost == 3 + 2).all()


def test_build():
    utility = [[0, 1, 5], [2, 0, 0]]
    counts = np.array([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    resident = np.array([[False, False, True], [False, True, False]])
    p = BalanceProblem.build(utility, counts, resident, COST, 2, 5000, tokens=1, horizon=4)
    np.testing.assert_array_equal(p.slots, [[2, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(p.new_bytes, [[1000, 0, 0, 0, 0, 0], [1000, 1000, 0, 0, 0, 0]])
    # layer 0, t = 1: experts 1 and 2 on the GPU (one token a window: each certain), none on the CPU
    assert p.gpu[0, 0] == pytest.approx(30e-6 + 2 * 2.4e-6 + 3 * 0.02e-6)
    assert p.cpu[0, 0] == 0 and p.gpu[0, 5] == 0
    assert p.cpu[0, 5] == pytest.approx(20e-6 + 2 * 95e-6 + 3 * 6e-6)
    assert p.h2d[0, 0] == pytest.approx((8e-6 + 1e-4) / 4)


def test_free_slots_go_where_they_save_most():
    utility = np.array([[5, 1, 1, 1], [5, 1, 1, 1]])
    counts = np.array([[3.0, 2.0, 2.0, 2.0], [3.0, 0.1, 0.1, 0.1]])
    p = BalanceProblem.build(utility, counts, np.ones((2, 4)), COST, 3, 0, tokens=9)
    plan = brute_force(p)
    assert (plan.tau > 1).all() and plan.slots.tolist() == [2, 1]  # one was left after 1 + 1
    full = dataclasses.replace(p, pool=100)
    assert brute_force(full).slots.tolist() == [4, 4]  # never more than there are experts


@settings(max_examples=50, deadline=None)
@given(problems(4, 3))
def test_improve_keeps_feasible_and_never_worsens(problem):
    start = np.full(4, 2, dtype=np.intp)
    if problem.feasible(start):
        better = improve(problem, start)
        assert problem.feasible(better)
        assert problem.usage(better)[0] <= problem.usage(start)[0] + 1e-9


@needs_solver
def test_infeasible_and_late_leave_nothing_and_are_counted():
    problem = realistic(np.random.default_rng(0), 8)
    balancer = Balancer()
    assert balancer.solve(dataclasses.replace(problem, pool=-1)) is None
    assert (balancer.failed, balancer.late, balancer.error) == (1, 0, "infeasible")
    balancer.time_limit = 0.0
    assert balancer.solve(problem) is None
    assert (balancer.failed, balancer.late) == (1, 1) and "late" in balancer.error
    balancer.time_limit = 5.0
    assert balancer.solve(problem) is not None and balancer.solved == 1


@pytest.mark.parametrize("module", ["cvxpy", "highspy"])
def test_absent_solver_is_a_counted_failure(monkeypatch, module):
    if module == "highspy":
        pytest.importorskip("cvxpy")
        code = "import sys; sys.modules['highspy'] = None\n"
    else:
        code = "import sys; sys.modules['cvxpy'] = None\n"
    code += (
        "import numpy as np\nfrom spac.balance import *\n"
        "a = np.ones((2, 2)); b = Balancer()\n"
        "p = BalanceProblem(a, a, a, a, a, pool=4, byte_window=4)\n"
        "assert b.solve(p) is None and b.failed == 1 and b.error, b.error\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_import_is_light():
    code = (
        "import sys, spac.balance, spac.trace\n"
        "heavy = {'torch', 'cvxpy', 'triton', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cpu": np.ones((2, 3))}, r"cpu: needed \[layers, thresholds\] like gpu, got \(2, 3\)"),
        ({"slots": np.full((2, 2), np.nan)}, "slots: needed finite values"),
        ({"new_bytes": np.full((2, 2), -1.0)}, "new_bytes: needed finite values of at least 0"),
        ({"byte_window": float("inf")}, "byte_window: needed a finite number, got inf"),
    ],
    ids=["shape", "nan", "negative", "inf"],
)
def test_bad_data_is_named(change, message):
    a = np.ones((2, 2))
    good = {n: a for n in ("gpu", "cpu", "h2d", "slots", "new_bytes")}
    with pytest.raises(ValueError, match=message):
        BalanceProblem(**(good | {"pool": 1, "byte_window": 1} | change))


class SlowBalancer(Balancer):
    """Answers with the pool it was given, when released."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.seen = threading.Semaphore(0), []

    def solve(self, problem):
        self.gate.acquire()
        self.seen.append(problem.pool)
        return None if problem.pool < 0 else brute_force(problem)


def test_thread_takes_the_newest_and_never_blocks():
    a = np.ones((2, 2))
    slow = SlowBalancer()
    worker = BalancerThread(slow)
    worker.start()
    try:
        assert worker.poll() is None
        start = time.perf_counter()
        for pool in (2, 3, 4):
            worker.submit(BalanceProblem(a, a, a, a, a, pool=pool, byte_window=9))
            if pool == 2:
                while worker._problem is not None:  # the worker has taken the first
                    time.sleep(0.001)
        assert worker.poll() is None
        slow.gate.release()
        slow.gate.release()
        plan = None
        while plan is None or plan.slots.sum() < 4:
            assert time.perf_counter() - start < PATIENT
            plan = worker.poll() or plan
            time.sleep(0.001)
        assert slow.seen == [2, 4]  # 3 was overtaken
        assert worker.poll() is None  # handed out once
    finally:
        slow.gate.release()
        worker.close()
    assert not worker._thread.is_alive()
