import numpy as np
import pytest

from spac.cost import CostModel
from spac.keep import exchange, margin, ranked, stream_and_keep
from spac.policy import make_policy
from spac.replay import Window, replay

# A GPU expert costs 1 s, reading one over the link 4 s, a layer 2 s besides.
SLOW_CPU = CostModel(1, 0.0, 1.0, 0.0, 0.0, 10.0, 0.0, 0.0, 4.0, dense_layer=2.0)
FAST_CPU = CostModel(1, 0.0, 1.0, 0.0, 0.0, 3.0, 0.0, 0.0, 4.0, dense_layer=2.0)


def run(rows, slots, cost, **options):
    """One layer of 4 experts, LRU, no rounds of copies; rows: ids of each window's tokens."""
    windows = [Window(np.array(r)[:, None, None], len(r) - 1, 0.0) for r in rows]
    options = {"streaming": True, "max_copies": 0, "warmup": 0.0, **options}
    return replay(windows, make_policy("lru", 1, 4, slots), cost, slots, **options)


def plainly(n, value, key, resident, streams):
    streamed, kept = [], []
    for e in sorted(range(len(n)), key=lambda e: (-key[e], e)):
        if n[e] and not resident[e] and len(streamed) < streams:
            streamed.append(e)
    idle = sorted((e for e in range(len(n)) if resident[e] and not n[e]), key=lambda e: value[e])
    for new, old in zip(streamed, idle, strict=False):
        if key[new] > value[old]:
            kept.append((new, old))
    return streamed, kept


@pytest.mark.parametrize("experts", [1, 7, 32])
def test_the_highest_keys_stream_and_replace_the_lowest_idle_values(experts):
    rng = np.random.default_rng()
    for _ in range(50):
        n = rng.integers(0, 3, experts).astype(float)
        value, resident = rng.random(experts) * 3, rng.random(experts) < 0.4
        value[rng.random(experts) < 0.1] = np.inf  # leaving
        value[~resident & (rng.random(experts) < 0.1)] = -np.inf  # a copy is under way
        streams = int(rng.integers(0, experts + 1))
        key = np.where(resident, value, np.minimum(value, 9)) + n
        streamed, new, old = stream_and_keep(n, value, key, resident, streams)
        kept = list(zip(new.tolist(), old.tolist(), strict=True))
        assert (streamed.tolist(), kept) == plainly(n, value, key, resident, streams)
        assert np.isfinite(value[old]).all() and (key[new] > -np.inf).all()


def test_an_exchange_never_lowers_a_key_and_ends_at_the_margin():
    rng = np.random.default_rng()
    key, resident = rng.random(60), rng.random(60) < 0.5
    missing = ranked(key, ~resident)
    new, old = exchange(key, missing, resident)
    after = resident.copy()
    after[new], after[old] = True, False
    assert after.sum() == resident.sum() and key[after].min() > key[~after].max()
    three = exchange(key.reshape(6, 10), missing[:3], resident.reshape(6, 10))
    assert np.array_equal(three, (new[:3], old[:3]))
    few, whose = exchange(key, missing, resident, 0.4)
    assert len(few) < len(new) and (key[few] > key[whose] + 0.4).all()


def test_copies_beside_streams_must_win_by_more():
    assert 0 < margin(0) < margin(0.5) < margin(3)


def test_what_streamed_is_there_in_the_next_window():
    rows = [[1], [1], [2], [1]]
    lost, kept = (run(rows, 1, SLOW_CPU, keep=k) for k in (False, True))
    assert lost.coverage_by_window == [0, 0, 0, 0] and lost.kept == 0
    assert kept.coverage_by_window == [0, 1, 0, 0] and kept.kept == kept.streamed == 3
    assert kept.copies == 0 and kept.step_seconds == [6, 3, 6, 6]


def test_residents_with_pairs_stay():
    # Expert 0 is resident and used: expert 1 finds no slot, streams again and again.
    r = run([[0, 1], [0, 1], [0, 1]], 1, SLOW_CPU, keep=True)
    assert (r.kept, r.streamed, r.coverage) == (0, 3, 0.5)


def test_while_a_draft_runs_the_last_window_is_copied(monkeypatch):
    monkeypatch.setattr("spac.replay.DRAFT_LATER", 0.5)
    monkeypatch.setattr("spac.replay_slots.COPIES_LATER", 1.0)
    rows, options = [[1, 1], [1, 1], [2, 2], [2, 2]], {"keep": True, "draft_copies": True}
    copied = run(rows, 1, FAST_CPU, draft_token=5.0, **options)
    assert copied.streamed == 0 and copied.copies == 2  # the CPU computed what was missing
    assert copied.coverage_by_window == [0, 1, 0, 1]
    assert copied.step_seconds == [5.5 + 5, 5.5 + 3, 5.5 + 5, 5.5 + 3]  # none waited for a copy
    too_short = run(rows, 1, FAST_CPU, draft_token=4.9, **options)
    assert too_short.coverage == 0 and too_short.copies == 0
