import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from spac.balance import Balancer
from spac.cost import CostModel
from spac.machine import MACHINES, Machine, find_machine
from spac.policy import POLICIES, make_policy
from spac.profile import Profile
from spac.replay import (
    REJECTED,
    Window,
    WindowSource,
    make_windows,
    oracle_bound,
    replay,
    window_counts,
)
from spac.replay_slots import Rounds
from spac.trace import Trace, load_trace, save_trace

REAL = Path(__file__).resolve().parents[2] / "shared" / "traces"
# Round numbers: a GPU expert costs 1 s, a CPU expert 10 s, a copy 4 s, a layer 2 s.
COST = CostModel(1, 0.0, 1.0, 0.0, 0.0, 10.0, 0.0, 0.0, 4.0, dense_layer=2.0)


def trace_of(rows, experts):
    return Trace(np.array(rows, dtype=np.uint8), experts)


def synthetic(tokens=96, layers=6, experts=16, k=2, seed=0):
    """Sticky, skewed routing: half of the tokens choose as the token before."""
    rng = np.random.default_rng(seed)
    p = 1 / np.arange(1, experts + 1)
    taste = [rng.permutation(experts) for _ in range(layers)]
    rows: list = []
    for t in range(tokens):
        fresh = [taste[j][rng.choice(experts, k, False, p / p.sum())] for j in range(layers)]
        rows.append(rows[-1] if t and rng.random() < 0.5 else fresh)
    return trace_of(rows, experts)


def run(rows, experts, slots, policy="lru", warmup=0.0, **options):
    windows = [Window(np.array(r)[:, :, None], len(r) - 1, 0.0) for r in rows]
    p = make_policy(policy, windows[0].ids.shape[1], experts, slots)
    return replay(windows, p, COST, slots, warmup=warmup, **options)


def test_time_is_dense_plus_the_slowest_side():
    # one layer, expert 0 resident. Window 1: expert 0. Window 2: experts 0 and 1.
    r = run([[[0]], [[0], [1]]], 2, 1)
    assert r.step_seconds == [2 + 1, 2 + 10]
    assert (r.tokens, r.pairs, r.resident_pairs) == (3, 3, 2)
    assert r.tokens_per_second == pytest.approx(3 / 15)


def test_a_window_is_one_event():
    """Expert 1 is needed by both tokens of a window: two misses, whatever is fetched for one."""
    rows = [[[1], [1]]] * 3
    assert run(rows, 2, 1, live=True).coverage_by_window == [0, 1, 1]
    # An order read at the start of a window knows of the miss one window later.
    late = run(rows, 2, 1)
    assert late.coverage_by_window == [0, 0, 1] and late.step_seconds == [12, 12, 3]


def test_copies_take_their_time_and_late_ones_are_counted():
    slow = CostModel(1, 0.0, 1.0, 0.0, 0.0, 10.0, 0.0, 0.0, 15.0, dense_layer=2.0)
    windows = [Window(np.array([[[1]]]), 0, 0.0)] * 4
    r = replay(windows, make_policy("lru", 1, 2, 1), slow, 1, warmup=0.0, live=True)
    assert r.step_seconds == [12, 12, 3, 3] and r.late == 1 and r.copies == 1


def test_wasted_copies_are_those_evicted_unused():
    # Expert 1 is used once, then copied; expert 2 displaces it before it is used again.
    r = run([[[1]], [[2]], [[2]], [[2]]], 3, 1, live=True)
    assert (r.copies, r.wasted) == (2, 1)


def test_streaming_splits_three_ways_and_keeps_what_it_read():
    rows = [[[0], [1], [2], [3], [4]]] * 2
    two, three = run(rows, 5, 1), run(rows, 5, 1, streaming=True)
    assert two.step_seconds[0] == 2 + 40
    assert three.step_seconds[0] == 2 + 12  # three experts over the link (12 s), one on the CPU
    assert three.streamed >= 3 and three.seconds < two.seconds


def test_rounds_copy_as_the_engine_does():
    """One slot, expert 1 wanted: evicted when a window begins, free and filled in the next one,
    seen by the one after."""
    r = run([[[1]]] * 6, 3, 1, max_copies=4)
    assert r.coverage_by_window == [0, 0, 0, 1, 1, 1]
    assert [int(held[0]) for held in r.residency] == [1, 1, 0, 1, 1, 1]
    # A copy that lasts longer than the window is seen later, and no round begins meanwhile.
    slow = CostModel(1, 0.0, 1.0, 0.0, 0.0, 10.0, 0.0, 0.0, 15.0, dense_layer=2.0)
    windows = [Window(np.array([[[1]]]), 0, 0.0)] * 6
    r = replay(windows, make_policy("lru", 1, 2, 1), slow, 1, warmup=0.0, max_copies=4)
    assert r.coverage_by_window == [0, 0, 0, 0, 1, 1] and r.copies == 1 and r.late == 2
    assert run([[[1]]] * 6, 3, 1, max_copies=0).copies == 0


def test_rounds_share_the_link_with_streams():
    cost = CostModel(1, 0.0, 1.0, 0.0, 0.0, 10.0, 0.0, 0.0, 4.0, stream_byte=5.0)
    slots = Rounds(1, 8, 2, cost, 4)
    assert slots.stream(2) == 10  # nothing is copied
    slots._queue, slots.left = [2, 3], 8.0
    # Copies leave half of the link, 8 s an expert; they end after 16 s.
    assert slots.link_seconds([0, 1, 2]).tolist() == [0, 8, 16]
    assert slots.stream(1) == 8 and slots.left == pytest.approx(4)
    assert sorted(slots.under_way()) == [2, 3]
    assert slots.stream(2) == pytest.approx(8 + 5) and slots.left == pytest.approx(0)


def test_a_layer_pays_the_hand_over_unless_all_is_resident():
    cost = replace(COST, handoff=3.0)
    windows = [Window(np.array([[[0]]]), 0, 0.0)]
    for slots, seconds in ((1, 6.0), (2, 3.0)):
        policy = make_policy("lru", 1, 2, slots)
        assert replay(windows, policy, cost, slots, warmup=0.0).step_seconds == [seconds]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "oracle"])
def test_invariants_and_the_oracle_is_a_bound(policy, streaming):
    trace = synthetic()
    windows = make_windows(trace, 3)
    cost = MACHINES["h200"].cost(9_437_184, 9_437_184)
    for slots in (0, 11, 40, 96):
        p = make_policy(policy, 6, 16, slots)
        r = replay(windows, p, cost, slots, streaming=streaming, live=policy == "activation")
        assert r.tokens == sum(w.accepted + 1 for w in windows if w.at >= 0.25)
        assert 0 <= r.coverage <= 1 and r.wasted <= r.copies + slots
        assert all(held.sum() <= slots for held in r.residency)
        assert r.bytes_per_token == pytest.approx((r.copies + r.streamed) * 9_437_184 / r.tokens)
        bound = oracle_bound(windows, 16, cost, slots, streaming=streaming)
        assert r.tokens_per_second <= bound.tokens_per_second * 1.02
        if slots == 96:
            assert r.coverage == 1 and r.copies == r.streamed == 0


def test_faster_links_and_larger_pools_help():
    windows = make_windows(synthetic(), 3)
    speeds = []
    for slots, gbs in ((20, 5), (20, 50), (60, 50)):
        machine = Machine(**(vars(MACHINES["h200"]) | {"h2d_bandwidth": gbs * 1e9}))
        cost = machine.cost(9_437_184, 9_437_184)
        speeds.append(oracle_bound(windows, 16, cost, slots).tokens_per_second)
    assert speeds == sorted(speeds) and speeds[0] < speeds[2]


@pytest.mark.parametrize("policy", ["spac", "activation", "lfu"])
def test_a_profile_of_the_trace_helps_its_first_windows(policy):
    trace = synthetic()
    windows, cost = make_windows(trace, 3), MACHINES["h200"].cost(9_437_184, 9_437_184)
    first = [
        np.mean(
            replay(
                windows, make_policy(policy, 6, 16, 30), cost, 30, warmup=0.0, profile=start
            ).coverage_by_window[:4]
        )
        for start in (None, Profile.of_trace(trace))
    ]
    assert first[1] > first[0] + 0.1
    other = Profile.of_trace(Trace(trace.expert_ids[:, :5], 16))
    with pytest.raises(ValueError, match="5 layers x 16 experts; this model has 6 x 16"):
        replay(windows, make_policy(policy, 6, 16, 30), cost, 30, profile=other)


@pytest.mark.parametrize("rejected", REJECTED)
def test_windows_with_rejected_rows(rejected):
    trace = synthetic()
    windows = make_windows(trace, 3, acceptance=0.5, rejected=rejected, seed=1)
    start = 0
    for w in windows:
        kept = w.accepted + 1
        np.testing.assert_array_equal(w.ids[:kept], trace.expert_ids[start : start + kept])
        assert w.at == start / 96 and w.ids.shape == (4, 6, 2)
        assert (np.diff(np.sort(w.ids, axis=2), axis=2) > 0).all()  # k distinct experts
        if rejected == "repeat" and kept < 4:
            np.testing.assert_array_equal(w.ids[-1], w.ids[w.accepted])
        start += kept
    assert 0.3 < np.mean([w.accepted for w in windows]) < 1.5
    assert {w.accepted for w in make_windows(trace, 3)} == {3}


def test_window_errors():
    trace = synthetic(8)
    with pytest.raises(ValueError, match=r"gamma: needed 0..7 for this trace, got 8"):
        make_windows(trace, 8)
    with pytest.raises(ValueError, match="acceptance: needed 0..1, got 2"):
        WindowSource(trace, 2)
    with pytest.raises(ValueError, match="rejected: expected one of next, .* got 'x'"):
        WindowSource(trace, 0.5, "x")


def test_balancer_sets_thresholds_and_quotas():
    pytest.importorskip("cvxpy")
    windows = make_windows(synthetic(), 3)
    cost = MACHINES["h200"].cost(9_437_184, 9_437_184)
    policy, balancer = make_policy("spac", 6, 16, 30), Balancer()
    replay(windows, policy, cost, 30, balancer=balancer, balance_every=4)
    assert balancer.solved == 5 and balancer.failed == 0
    assert policy.quota.sum() == 30 and ((policy.tau >= 1) & (policy.tau <= 6)).all()


def test_machine_json(tmp_path):
    MACHINES["laptop"].save(tmp_path / "m.json")
    assert find_machine(str(tmp_path / "m.json")) == MACHINES["laptop"]
    with pytest.raises(ValueError, match="profile: expected one of h200, .*, got 'abacus'"):
        find_machine("abacus")
    for text, message in (
        ("{}", "format 'spac-machine-1'"),
        ('{"format": "spac-machine-1", "name": "x"}', "missing cpu_bandwidth"),
        ("[", "m.json: "),
    ):
        (tmp_path / "m.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            find_machine(str(tmp_path / "m.json"))
    with pytest.raises(ValueError, match="gpu_flops: needed a number in"):
        Machine(**(vars(MACHINES["h200"]) | {"gpu_flops": 0.0}))


def bench(name, *words):
    module = pytest.importorskip(f"spac.bench.{name}")
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    module.add_arguments(parser)
    return module.run(parser.parse_args(words))


def test_bench_replay_and_balance(tmp_path, monkeypatch):
    pytest.importorskip("cvxpy")
    path = tmp_path / "toy.npz"
    save_trace(path, synthetic(48))
    shape = ("--shape", "64", "32", "--cache", "0.3")
    engine = ("--streaming", "--max-copies", "4", "--prompt", "8", "--warmup", "0")
    assert len(bench("replay", str(tmp_path), *engine, "--window", "4", *shape).rows) == 4
    keep = ("--keep", "--draft-copies", "--policy", "spac", "lru")
    table = bench("replay", str(tmp_path), *engine, *keep, "--window", "4", *shape)
    assert all(r[table.columns.index("kept/window")] > 0 for r in table.rows)
    with pytest.raises(ValueError, match="--keep needs --streaming and --max-copies"):
        bench("replay", str(tmp_path), *keep, *shape)
    table = bench("replay", str(tmp_path), "--window", "4", "auto", *shape, "--policy", "spac")
    assert [r[table.columns.index("window")] for r in table.rows] == ["4", "auto"]
    assert table.rows[0][-1] <= 1.02 and table.rows[1][-1] is None
    with pytest.raises(ValueError, match="needed --shape HIDDEN INTERMEDIATE for the trace 'toy'"):
        bench("replay", str(path))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="traces: no npz files"):
        bench("replay", str(empty), *shape)
    monkeypatch.setattr(pytest.importorskip("spac.bench.balance"), "SIZES", ((12, 32),))
    sizes = bench("balance")
    assert [r[0] for r in sizes.rows] == ["12 x 32 x 6"]
    gap, failed = (sizes.columns.index(c) for c in ("worst gap to DP", "failed"))
    assert all(r[gap] < 1.1e-3 and r[failed] == 0 for r in sizes.rows)


def test_what_the_prompt_chose_most_is_there_from_the_first_window():
    trace = synthetic(24)
    _, layers, _ = trace.shape
    rate = np.random.default_rng(3).random((layers, trace.num_experts))
    slots = 3 * layers
    options = {"max_copies": 0, "prompt": rate, "warmup": 0.0}
    policy = make_policy("lru", layers, trace.num_experts, slots)
    result = replay(make_windows(trace, 3), policy, COST, slots, **options)
    most = [set(np.argsort(-row)[:3].tolist()) for row in rate]
    hits = [e in most[j] for row in trace.expert_ids for j, ids in enumerate(row) for e in ids]
    assert result.coverage == pytest.approx(np.mean(hits)) and result.copies == 0


def test_bench_predict(tmp_path):
    full_size = pytest.importorskip("spac.bench.full_size")
    save_trace(tmp_path / "toy.npz", synthetic(64))
    row = {"provider": "spac", "slots": "30%", "gamma": 3, "draft ms": 3.0, "coverage": 0.5}
    row |= {"ms/step": 10.0, "tokens/s": 100.0, "GB/token": 0.1, "copies/step": 1.0}
    rows = [row, row | {"provider": "resident", "slots": None}, row | {"provider": "lru"}]
    text = full_size.Text((0, 3), 24, 8, 16, 0.7, 1, 0)
    said = {"text": asdict(text), "costs": asdict(MACHINES["h200"].cost(1 << 20, 1e6))}
    notes = ["another", full_size.RUN + json.dumps(said)]
    (tmp_path / "m.json").write_text(json.dumps({"rows": rows, "notes": notes}))
    words = (str(tmp_path / "m.json"), "--trace", str(tmp_path / "toy.npz"))
    table = bench("predict", *words)
    found = [dict(zip(table.columns, r, strict=True)) for r in table.rows]
    assert [f["provider"] for f in found] == ["spac", "resident"]
    assert found[1]["coverage"] == 1 and found[0]["ms/step"] > found[1]["ms/step"] > 3
    drafts = [notes[0], full_size.RUN + json.dumps(said | {"draft_copies": True})]
    (tmp_path / "m.json").write_text(json.dumps({"rows": rows, "notes": drafts}))
    more = dict(zip(table.columns, bench("predict", *words).rows[0], strict=True))
    for name in ("coverage", "copies/step", "GB/token"):
        assert more[name] > found[0][name]
    said["costs"] |= {"h2d_byte": 0.0}  # as measured without a GPU
    alone = [full_size.RUN + json.dumps(said)]
    (tmp_path / "m.json").write_text(json.dumps({"rows": rows, "notes": alone}))
    with pytest.raises(ValueError, match="m.json: .* it ran without a GPU"):
        bench("predict", *words)
    for text in ("{}", json.dumps({"rows": rows, "notes": notes[:1]})):
        (tmp_path / "m.json").write_text(text)
        with pytest.raises(ValueError, match="m.json: no result of bench generate --shape"):
            bench("predict", *words)


def test_bench_plot(tmp_path):
    pytest.importorskip("matplotlib")
    save_trace(tmp_path / "toy.npz", synthetic(32))
    picture = tmp_path / "p.png"
    words = ("--window", "4", "--shape", "64", "32", "--policy", "lru", "--plot", str(picture))
    bench("replay", str(tmp_path), *words)
    assert picture.stat().st_size > 10_000


@pytest.mark.skipif(not REAL.is_dir(), reason="the development traces are not here")
@pytest.mark.parametrize("share", [0.1, 0.25])
@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "gemma-4-26b-a4b"])
def test_real_traces(name, share):
    """What docs/method.md claims of the engine: from a prompt on, copies in rounds, streams."""
    trace = load_trace(REAL / f"{name}.npz")
    _, layers, _ = trace.shape
    slots = int(share * layers * trace.num_experts)
    prompt, text = (Trace(part, trace.num_experts) for part in np.split(trace.expert_ids, [32]))
    windows, rate = make_windows(text, 7), Profile.of_trace(prompt).rate * 8
    cost = MACHINES["h200"].cost(9_437_184, 9_437_184)
    options = {"streaming": True, "max_copies": 64, "prompt": rate, "warmup": 0.0}
    speed = {}
    for name in ("spac", "lru", "lfu"):
        policy = make_policy(name, layers, trace.num_experts, slots)
        speed[name] = replay(windows, policy, cost, slots, **options).tokens_per_second
    assert speed["spac"] > 1.03 * speed["lru"] and speed["spac"] > 0.98 * speed["lfu"]
    policy = make_policy("spac", layers, trace.num_experts, slots)
    kept = replay(windows, policy, cost, slots, **options, keep=True)
    assert kept.tokens_per_second > 1.01 * speed["spac"] and kept.kept > kept.streamed / 2
    assert window_counts(windows[:1], trace.num_experts).sum() == windows[0].ids.size


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("live", [False, True])
def test_a_profile_does_not_move_who_knows_the_future(policy, live):
    trace = synthetic()
    windows, profile = make_windows(trace, 3, 0.7), Profile.of_trace(trace)
    made = make_policy(policy, 6, 16, 20)
    replay(windows, made, COST, 20, profile=profile, live=live)
    assert made.window == len(windows) + (0 if made.foresight else 16)


def test_bench_replay_of_traces_too_short_to_count(tmp_path):
    save_trace(tmp_path / "toy.npz", synthetic(9))
    short = (str(tmp_path), "--shape", "64", "32", "--cache", "0.3", "--policy", "spac")
    table = bench("replay", *short, "--window", "9")
    assert table.rows[0][-1] is None  # one window, all of it the warm-up


def test_bench_streams_cross_the_link_of_the_bandwidth_asked_for():
    from spac.bench.replay import shape_cost

    slow, usual = (shape_cost("toy", "h200", [64, 32], gbs) for gbs in (5.6, None))
    assert slow.h2d_byte == pytest.approx(10 * usual.h2d_byte)
    assert slow.stream_byte == pytest.approx(10 * usual.stream_byte)
