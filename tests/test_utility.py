import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spac import reference
from spac.utility import LADDER, Calibrator, pair_counts, settle, step, update


def window(rng, W, k, E, invalid=False):
    ids = np.stack([rng.permutation(E)[:k] for _ in range(W)]) if W else np.zeros((0, k), int)
    if invalid and W:
        ids[0, 0], ids[-1, -1] = -1, E
    return ids


@pytest.mark.parametrize("bounds", [(5, 1), (2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 6, 31), (0, 4, 8)], ids=str)
def test_update_is_the_reference_over_many_windows(shape, bounds):
    W, k, E = shape
    rng = np.random.default_rng(W * 7 + E)
    truth = torch.zeros(E, dtype=torch.int32)
    ours = np.zeros(E, dtype=np.int32)
    for _ in range(20):
        ids = window(rng, W, k, E, invalid=E > 8) % (8 if E > 8 else E + 1)
        reference.verify(
            torch.from_numpy(ids),
            torch.zeros(E, dtype=torch.int64),
            truth,
            torch.tensor(bounds, dtype=torch.int32),
            torch.zeros(4, dtype=torch.int64),
            5,
        )
        ours = update(ours, ids, *bounds)
        np.testing.assert_array_equal(ours, truth.numpy())
    assert ours.dtype == np.int32


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("accepted", [0, 2, 4])
def test_settle_is_the_reference(accepted, weight):
    rng = np.random.default_rng(3)
    L, W, k, E = 3, 5, 4, 9
    before = rng.integers(0, 6, (L, E)).astype(np.int32)
    ids = np.stack([window(rng, W, k, E, invalid=True) for _ in range(L)])
    bounds = np.array([(5, 1), (2, 1), (1, 2)], dtype=np.int32)
    truth = torch.from_numpy(before.copy())
    reference.settle(
        truth,
        torch.from_numpy(before),
        torch.from_numpy(ids),
        torch.tensor(accepted),
        torch.from_numpy(bounds),
        weight,
        5,
    )
    np.testing.assert_array_equal(settle(before, ids, accepted, bounds, weight), truth.numpy())


def test_settle_with_everything_accepted_is_update():
    rng = np.random.default_rng(4)
    before = rng.integers(0, 6, (1, 9)).astype(np.int32)
    ids = window(rng, 5, 4, 9)
    np.testing.assert_array_equal(
        settle(before, ids[None], 4, [(2, 1)], 0.0)[0], update(before[0], ids, 2, 1)
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=6),
    st.integers(1, 6),
    st.integers(1, 6),
    st.data(),
)
def test_step_stays_in_range_moves_by_one_and_is_monotone_in_n(u, up, down, data):
    n = data.draw(st.lists(st.integers(0, 9), min_size=len(u), max_size=len(u)))
    before = np.array(u, dtype=np.int32)
    after = step(before, n, up, down)
    assert ((after >= 0) & (after <= 5) & (abs(after - before) <= 1)).all()
    assert (step(before, np.array(n) + 1, up, down) >= after).all()


def test_pair_counts_weighs_rows_and_ignores_invalid_ids():
    ids = [[0, 1], [1, 3], [-1, 1]]
    np.testing.assert_array_equal(pair_counts(ids, 3), [1, 3, 0])
    np.testing.assert_array_equal(pair_counts(ids, 3, [1, 0.5, 0]), [1, 1.5, 0])


def skewed_windows(rng, L, E, W, k):
    """ids [L, W, k] with a Zipf-like taste per layer."""
    p = 1 / np.arange(1, E + 1)
    return np.stack(
        [[rng.choice(E, k, replace=False, p=p / p.sum()) for _ in range(W)] for _ in range(L)]
    )


def hot_after(mode, slots, windows=60):
    rng = np.random.default_rng(0)
    L, E = 4, 64
    u, cal = np.zeros((L, E), dtype=np.int32), Calibrator(L, mode)
    changes, history = [], []
    for _ in range(windows):
        ids = skewed_windows(rng, L, E, 9, 4)
        u = settle(u, ids, 8, cal.bounds)
        changes.append(cal.update(u, np.ones(L), np.full(L, slots)))
        history.append((u >= 1).sum())
    return np.mean(history[-20:]) / L, cal, changes


@pytest.mark.parametrize("slots", [3, 12, 40])
def test_calibrated_hot_experts_track_the_slots(slots):
    hot, cal, changes = hot_after("calibrated", slots)
    assert slots / 2 <= hot <= slots * 2
    assert sum(changes) < len(changes) / 4  # it settles
    assert cal.bounds.dtype == np.int32 and all(tuple(b) in LADDER for b in cal.bounds)


def test_reference_mode_never_moves_and_leaves_slots_empty():
    hot, cal, changes = hot_after("reference", 40)
    assert not any(changes) and (cal.bounds == (5, 1)).all()
    assert hot < 10


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode: expected 'reference' or 'calibrated', got 'fast'"):
        Calibrator(2, "fast")
