import numpy as np
import pytest

from spac.config import SpacConfig
from spac.control import Control, Snapshot
from spac.machine import MACHINES
from spac.policy import POLICIES, ActivationAware, PrefetchOracle, Spac, make_policy
from spac.utility import Calibrator, settle

L, E = 3, 6
FUTURE = np.random.default_rng(0).integers(0, 3, (4, L, E)).astype(float)


def window(policy, *layers, accepted=None):
    for layer, ids in enumerate(layers):
        policy.observe(layer, np.array(ids))
    policy.end_window(accepted)


def order(policy, layer=0):
    return np.argsort(-policy.score()[layer], kind="stable").tolist()


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_answers_with_a_finite_score(name):
    policy = make_policy(name, L, E, 4)
    policy.prepare(FUTURE)
    for w in range(4):
        score = policy.score()
        assert score.shape == (L, E) and np.isfinite(score).all()
        value = policy.value()
        assert value.shape == (L, E) and np.isfinite(value).all()
        wanted = policy.wanted()
        assert wanted is None or (wanted.shape == (L, E) and wanted.dtype == bool)
        window(policy, *[[[w, 5]]] * L)


def test_values_are_in_pairs():
    """By default less than one pair whatever the policy, in its order; with "spac" by the share."""
    lfu, spac = make_policy("lfu", 1, E, 2), make_policy("spac", 1, E, 2)
    for policy in (lfu, spac):
        window(policy, [[0], [0], [0], [3]])
    assert lfu.value().max() < 1 and np.argsort(-lfu.value()[0])[:2].tolist() == [0, 3]
    np.testing.assert_allclose(spac.value()[0], [E * 3 / 32, 0, 0, E / 32, 0, 0])


def test_unknown_policy():
    with pytest.raises(ValueError, match="policy: expected one of spac, .*, got 'best'"):
        make_policy("best", L, E, 4)


def test_lru_lfu_and_lfru_disagree_where_they_should():
    """Expert 0: often, long ago. 1: once, just now. 2: twice, one window ago."""
    first = {"lru": 1, "lfu": 0, "lfru": 2}
    for name, best in first.items():
        policy = make_policy(name, 1, E, 2)
        window(policy, [[0], [0], [0]])
        for _ in range(8):
            window(policy, [[3]])
        window(policy, [[2], [2]])
        window(policy, [[1]])
        ranked = [e for e in order(policy) if e in (0, 1, 2)]
        assert ranked[0] == best, name
        assert (ranked.index(2) < ranked.index(0)) == (name != "lfu")


def test_reference_mode_is_the_released_state_machine():
    rng, policy = np.random.default_rng(1), make_policy("spac-reference", L, E, 4)
    u = np.zeros((L, E), dtype=np.int32)
    for _ in range(30):
        ids = rng.integers(0, E, (L, 9, 2))
        window(policy, *ids)
        u = settle(u, ids, 8, [(5, 1)] * L)
        np.testing.assert_array_equal(policy.utility, u)
        np.testing.assert_array_equal(np.floor(policy.score()), u)  # ties broken below one


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_rejected_rows_count_by_weight(weight):
    rng, bounds = np.random.default_rng(2), [(2, 1)] * L
    policy = Spac(L, E, L * E, weight)
    policy.calibrator = Calibrator(L, "reference")  # bounds that stay
    policy.calibrator.bounds[:] = 2, 1
    u = np.zeros((L, E), dtype=np.int32)
    for accepted in (0, 2, 4, 1):
        ids = rng.integers(0, E, (L, 5, 2))
        window(policy, *ids, accepted=accepted)
        u = settle(u, ids, accepted, bounds, weight)
        np.testing.assert_array_equal(policy.utility, u)


def test_scores_follow_a_change_of_topic():
    policy, lfu = Spac(1, E, 2), make_policy("lfu", 1, E, 2)
    for p in (policy, lfu):
        for _ in range(200):
            window(p, [[0], [1]])
        assert set(order(p)[:2]) == {0, 1}
        for _ in range(40):  # 80 pairs; the memory is 12 for each of 6 experts
            window(p, [[3], [4]])
    assert set(order(policy)[:2]) == {3, 4}
    assert set(order(lfu)[:2]) == {0, 1}


def test_calibrated_scores_are_shares_whatever_the_window():
    policy, wide = Spac(L, E, 4), Spac(L, E, 4)
    for _ in range(5):
        for ids in ([[0, 1]], [[0, 2]], [[0, 3]]):
            window(policy, *[ids] * L)
        window(wide, *[[[0, 1], [0, 2], [0, 3]]] * L)
    np.testing.assert_allclose(wide.score()[0], [1 / 2, 1 / 6, 1 / 6, 1 / 6, 0, 0])
    np.testing.assert_allclose(policy.score(), wide.score(), atol=0.02)
    np.testing.assert_allclose(wide.expected.sum(axis=1), 6)


def test_activation_learns_what_follows():
    """Layer 3 repeats layer 0's expert; history alone cannot tell which comes next."""
    rng, policy = np.random.default_rng(3), ActivationAware(4, 8, 4)
    right = 0
    for w in range(120):
        chosen = int(rng.integers(8))
        policy.observe(0, [[chosen]])
        guess = int(policy.score()[3].argmax())
        right += w >= 60 and guess == chosen
        for layer in (1, 2):
            policy.observe(layer, [[int(rng.integers(8))]])
        policy.observe(3, [[chosen]])
        policy.end_window()
    assert right > 50  # of 60; chance is 8


def test_oracle_prefers_sooner_and_belady_keeps_it():
    counts = np.zeros((4, 1, 4))
    counts[1, 0, 2] = counts[2, 0, 1] = counts[3, 0, 1] = 1
    oracle, belady = PrefetchOracle(1, 4, 1), make_policy("belady", 1, 4, 1)
    for policy in (oracle, belady):
        policy.prepare(counts)
        assert order(policy)[:2] == [2, 1]
    assert not belady.wanted().any()  # nothing was used yet, so nothing is demanded
    window(belady, [[2]])
    assert np.flatnonzero(belady.wanted()).tolist() == [2]
    window(belady, [[2]])
    assert order(belady)[0] == 1  # 2 is never used again


@pytest.mark.parametrize(("name", "rel"), [("spac", 0.1), ("lfu", 1e-9)])
def test_windows_that_passed_during_a_round_of_copies_all_count(name, rel):
    rng = np.random.default_rng()
    counts = rng.integers(0, 5, (12, 3, 16)).cumsum(axis=0)  # before window 1, 2, ...
    held, zeros = np.zeros((3, 16), dtype=bool), np.zeros((3, 16), dtype=np.int32)

    def remembered(windows):
        costs = MACHINES["h200"].cost(1 << 20, 1e6)
        control = Control(SpacConfig(policy=name, rebalance_every=100), costs, 3, 16, 2, 12)
        for w in windows:
            control.observe(Snapshot(w, float(w), zeros, counts[w]), held)
        control.close()
        return control.policy.state["count"]

    late, each = remembered((1, 11)), remembered(range(1, 12))
    np.testing.assert_allclose(late.sum(axis=1), each.sum(axis=1), rtol=rel)


def test_a_pause_of_many_windows_is_taken_in_at_once():
    control = Control(SpacConfig(), MACHINES["h200"].cost(1 << 20, 1e6), 2, 8, 2, 4)
    many = np.full((2, 8), 1 << 40, dtype=np.int64)
    control.observe(Snapshot(1 << 30, 1.0, many.astype(np.int32) * 0, many), many < 0)
    control.close()
    assert control.policy.window == 64


def test_a_pause_before_a_prompt_is_no_long_window():
    control = Control(SpacConfig(), MACHINES["h200"].cost(1 << 20, 1e6), 2, 8, 2, 4)
    zeros, prompt = np.zeros((2, 8), dtype=np.int64), np.ones((2, 8))
    for w in range(1, 40):
        control.observe(Snapshot(w, 0.01 * w, zeros, zeros), zeros > 0)
    control.observe(Snapshot(40, 3600.0, zeros, zeros, prompt), zeros > 0)
    control.observe(Snapshot(41, 3600.01, zeros, zeros), zeros > 0)
    control.close()
    assert control._window_seconds == pytest.approx(0.01, rel=0.01)
