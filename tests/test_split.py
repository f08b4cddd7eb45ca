"""The three-way split learns from the worker's clock what CPU and link really take."""

import numpy as np
import pytest
import torch

from spac.cost import CostModel
from spac.split import Split, Work
from spac.state import LayerState

LAYERS, EXPERTS = 24, 128
MEASURED = CostModel(9 << 20, 5e-6, 3e-6, 1e-8, 2e-5, 7e-5, 1e-6, 1e-5, 1.8e-11)


def window(rng, truth, streams, rest, most, least=0):
    """One window of a machine with the costs `truth`."""
    missing = rng.integers(least, most + 1, LAYERS)
    streamed = np.minimum(streams[missing], missing)
    left = missing - streamed
    here = rng.integers(1, 5, LAYERS)
    counts = np.stack([missing + here, here, missing + here, here], axis=1)
    cpu = np.where(left > 0, truth.cpu(left, left) * rng.normal(1, 0.03, LAYERS), 0)
    gpu = truth.gpu(here, here) + truth.stream(streamed)
    took = np.maximum(cpu, gpu) + rest
    begin = 100 + np.concatenate([[0], np.cumsum(took)[:-1]])
    times = np.stack([begin, begin + cpu], axis=1) * (left > 0)[:, None]
    waited = np.floor(np.maximum(cpu - gpu, 0) * 1e6) * 1e-6
    return Work(9, counts, streamed, times, waited), float(took.sum())


@pytest.mark.parametrize("link, cpu", [(2.0, 1.0), (0.5, 1.0), (1.3, 1.4), (1.0, 0.6)])
@pytest.mark.parametrize("most", [3, 18])
def test_comes_to_the_split_of_the_real_machine(link, cpu, most):
    rng = np.random.default_rng(0)
    truth = CostModel(**{
        **vars(MEASURED),
        "cpu_expert": cpu * MEASURED.cpu_expert,
        "stream_byte": link * MEASURED.h2d_byte,
    })  # fmt: skip
    split = Split(MEASURED, EXPERTS)
    first = split.streams
    for _ in range(200):
        split.observe(window(rng, truth, split.streams, 6e-5, most)[0])

    def seconds(streams):
        fixed = np.random.default_rng(1)
        return sum(window(fixed, truth, streams, 6e-5, most)[1] for _ in range(40))

    best = seconds(truth.streams(EXPERTS, float(truth.gpu(2.5, 2.5))))
    assert seconds(split.streams) <= 1.03 * best
    assert seconds(split.streams) <= 1.005 * seconds(first)


def test_looks_again_when_nothing_is_streamed():
    split, rng = Split(MEASURED, EXPERTS), np.random.default_rng(0)
    slow = CostModel(**{**vars(MEASURED), "stream_byte": 1e-9})
    for _ in range(100):
        split.observe(window(rng, slow, split.streams, 6e-5, 4)[0])
    assert not split.streams[:5].any()
    for _ in range(2000):
        split.observe(window(rng, MEASURED, split.streams, 6e-5, 4)[0])
    assert split.streams[4]


def test_what_was_seen_is_told():
    split, rng = Split(MEASURED, EXPERTS), np.random.default_rng()
    assert split.seen() == {"cpu": {}, "ready": {}, "rest": {}}
    for _ in range(64):
        split.observe(window(rng, MEASURED, MEASURED.streams(EXPERTS), 6e-5, 12)[0])
    seen = split.seen()
    for n, (count, mean, median) in seen["cpu"].items():
        expected = float(MEASURED.cpu(n, n))
        assert count < 20 or (mean, median) == pytest.approx((expected, expected), rel=0.1)
    for n, (_, mean, _) in seen["ready"].items():
        expected = float(MEASURED.gpu(2.5, 2.5) + MEASURED.stream(n))
        assert mean == pytest.approx(expected, abs=8e-6)
    assert len(seen["cpu"]) > 4 and len(seen["ready"]) > 2
    assert seen["rest"].keys() == {9} and seen["rest"][9][2] == pytest.approx(6e-5, abs=2e-6)


def test_windows_that_say_nothing_change_nothing():
    split = Split(MEASURED, EXPERTS)
    work, _ = window(np.random.default_rng(0), MEASURED, split.streams, 6e-5, 4)
    idle = Work(9, work.counts, work.streamed, work.times * 0, work.waited)
    undone = Work(9, -work.counts, work.streamed, work.times, work.waited)
    before = split.streams
    for _ in range(20):
        split.observe(idle)
        split.observe(undone)
    assert split.streams is before and split.costs is MEASURED


def test_the_state_is_one_piece(device):
    state = LayerState.new(3, 5, 2, torch.device(device))
    assert state.exchanged.shape == (3, 2, 2) and (state.exchanged == -1).all()
    state.exchanged.zero_()
    state.utility[1, 4], state.frequency[2, 0] = 7, 1 << 40
    state.counters[0, 3], state.streamed[2, 0] = 5, 9
    host = state.receive(state.send())
    state.memory.zero_()
    assert host.utility[1, 4] == 7 and host.frequency[2, 0] == 1 << 40
    assert host.counters[0, 3] == 5 and host.streamed[2, 0] == 9
    assert not state.utility.any() and host.memory.count_nonzero() == 4


@pytest.mark.parametrize("wrong", [{"cpu_expert": 1e-2}, {"stream_byte": 1e-16}])
def test_looks_again_when_everything_is_streamed(wrong):
    """What it learnt of CPU or link was an accident: then no clock runs any more."""
    split, rng = Split(MEASURED, EXPERTS), np.random.default_rng()
    split.costs = CostModel(**{**vars(MEASURED), **wrong})
    split.streams = split.costs.streams(EXPERTS)
    assert (split.streams[:5] == np.arange(5)).all()
    for _ in range(600):
        split.observe(window(rng, MEASURED, split.streams, 6e-5, 4)[0])
    assert split.streams[4] < 4
    assert split.costs.cpu(4, 4) == pytest.approx(float(MEASURED.cpu(4, 4)), rel=0.1)


@pytest.mark.parametrize("slower", [0.1, 3, 10])
def test_a_cpu_far_from_the_measured_one_is_learnt(slower):
    split, rng = Split(MEASURED, EXPERTS), np.random.default_rng()
    change = {n: slower * getattr(MEASURED, n) for n in ("cpu_launch", "cpu_expert", "cpu_pair")}
    truth = CostModel(**{**vars(MEASURED), **change})
    for _ in range(64):
        split.observe(window(rng, truth, MEASURED.streams(EXPERTS), 6e-5, 18)[0])
    for n in (2, 8):
        assert split.costs.cpu(n, n) == pytest.approx(float(truth.cpu(n, n)), rel=0.05)


@pytest.mark.parametrize("missing", [4, 8, 12])
def test_a_link_far_slower_than_believed_where_all_layers_are_alike(missing):
    """Every layer waits for the link and none for the CPU, which hides how long that takes."""
    believed = CostModel(**{**vars(MEASURED), "stream_byte": MEASURED.h2d_byte / 4})
    split, rng = Split(believed, EXPERTS), np.random.default_rng()
    for _ in range(250):
        split.observe(window(rng, MEASURED, split.streams, 6e-5, missing, missing)[0])
    best = MEASURED.streams(EXPERTS, float(MEASURED.gpu(2.5, 2.5)))[missing]
    assert abs(split.streams[missing] - best) <= 1 < believed.streams(EXPERTS)[missing] - best
