"""Copies while a draft runs: the text and every count stay right, and the replay chooses alike."""

import threading
import time

import numpy as np
import pytest
import torch

import spac
from spac.attachment import attachment
from spac.budget import bytes_for_ratio
from spac.config import SpacConfig
from spac.control import Control, Idle, Snapshot
from spac.copier import CopyThread
from spac.cost import CostModel
from spac.idle import Drafts
from spac.layout import ExpertLayout
from spac.policy import make_policy
from spac.pool import SlotPool
from spac.replay_slots import Rounds
from spac.state import LayerState
from spac.store import HostStore
from spac.utility import pair_counts

LAYERS, EXPERTS, TOP_K = 3, 10, 2
LAYOUT = ExpertLayout(EXPERTS, 4, 3, torch.float32)
COSTS = CostModel(LAYOUT.blob_bytes, *[1e-6] * 6, h2d_latency=1.0, h2d_byte=0.0)


@pytest.fixture(autouse=True)
def short_drafts_count(monkeypatch):
    monkeypatch.setattr("spac.keep.SHORTEST_DRAFT", 0.0)


def attach(model, draft, **settings):
    settings = {"max_length": 128, "stream_missing": True, "rebalance_every": 4} | settings
    budget = bytes_for_ratio(model, 0.3, SpacConfig(**settings), draft)
    return spac.attach(model, budget, draft=draft, **settings)


def check(engine):
    """Every expert that the pool tells of is whole, in a slot of its own, and shown."""
    pool, base = engine.pool, engine.pool.memory.data_ptr()
    slots = pool.slot_of[pool.slot_of >= 0]
    assert len(set(slots.tolist())) == len(slots)
    for layer, expert in np.argwhere(pool.slot_of >= 0):
        slot, blob = int(pool.slot_of[layer, expert]), engine.store.blobs[layer][expert]
        assert torch.equal(pool.memory[slot, : blob.numel()].cpu(), blob)
        assert int(pool.address[layer, expert]) == base + slot * pool.slot_bytes
    assert int((pool.address != 0).sum()) == len(slots)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 3}], ids=["greedy", "seeded"])
def test_text_and_counts(tiny_moe, device, static, sampling):
    """Without rounds, so that every copy after the first fill is one of a draft."""
    model, draft = tiny_moe().to(device), tiny_moe(num_hidden_layers=1)
    prompts = torch.randint(0, 96, (3, 1, 40))
    options = {"max_new_tokens": 40, **sampling}
    expected = [spac.generate(model, p, **options) for p in prompts]
    attach(model, draft, max_copies=0, static_windows=static)
    engine = attachment(model).engine
    pool, copier, filled = engine.pool, engine.copier, engine.copier.bytes_copied
    for prompt, text in zip(prompts, expected, strict=True):
        made = spac.generate(model, prompt, draft=draft, num_draft_tokens=4, **options)
        assert torch.equal(made.cpu(), text.cpu())
    copier.close()
    engine._learn()
    pool.publish()
    check(engine)
    loads = pool.loads - pool.num_slots
    assert loads == pool.evictions
    copies = (copier.bytes_copied - filled) // engine.store.layouts[0].blob_bytes
    assert copies == loads - pool.kept > 0
    assert copier.late == 0 and 0 <= copier.wasted <= copies
    spac.detach(model)


@pytest.mark.parametrize(
    "settings, drafts",
    [
        ({"draft_copies": False}, "a model"),
        ({"stream_missing": False}, "a model"),
        ({"policy": "static"}, "a model"),
        ({}, "ngram"),
        ({}, "itself"),
    ],
    ids=str,
)
def test_off(tiny_moe, settings, drafts):
    model, helper = tiny_moe(), tiny_moe(num_hidden_layers=1)
    prompt = torch.randint(0, 96, (1, 40))
    attach(model, helper, max_copies=0, **settings)
    engine = attachment(model).engine
    filled = engine.copier.bytes_copied
    draft = {"a model": helper, "ngram": "ngram", "itself": model}[drafts]
    spac.generate(model, prompt, draft=draft, num_draft_tokens=4, max_new_tokens=30)
    assert engine.copier.bytes_copied == filled and not engine.pool.quiet
    spac.detach(model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="graphs call no hooks")
def test_a_draft_that_dies(tiny_moe):
    """What was begun with it is complete before anybody else computes."""
    model, draft = tiny_moe(), tiny_moe(num_hidden_layers=1)
    prompt = torch.randint(0, 96, (1, 40))
    expected = spac.generate(model, prompt, max_new_tokens=30)
    attach(model, draft)
    engine = attachment(model).engine
    options = {"draft": draft, "num_draft_tokens": 3, "max_new_tokens": 30}
    calls = []

    def die(module, args):
        calls.append(0)
        if len(calls) == last:
            raise OSError("gone")

    handle = draft.register_forward_pre_hook(die)
    for last in (5, 8, 12, 15):  # a second or third step: three to a draft
        calls.clear()
        with pytest.raises(OSError, match="gone"):
            spac.generate(model, prompt, **options)
        assert engine.pool.quiet
        calls += [0] * last
        assert torch.equal(spac.generate(model, prompt, **options).cpu(), expected)
        assert engine.drafts._seconds and max(engine.drafts._seconds) < 5
    handle.remove()
    spac.detach(model)


class Thread:
    """In the place of a copy thread."""

    def __init__(self):
        self.told = []
        self.submit = self.told.append
        self.begun, self.waits = threading.Event(), []
        self.begun.wait = self.wait

    def wait(self, seconds):
        self.waits.append(seconds)

    def is_alive(self):
        return True


def test_how_long_a_draft_takes(monkeypatch):
    """The median of the drafts between two windows, by token."""
    now = [100.0]
    monkeypatch.setattr("spac.idle.time.perf_counter", lambda: now[0])

    class Sleeper(Thread):
        def wait(self, seconds):  # which is none of the draft's time
            super().wait(seconds)
            now[0] += seconds

    pool, thread = SlotPool([LAYOUT], 2, torch.device("cpu")), Sleeper()
    state = LayerState.new(1, EXPERTS, 1, torch.device("cpu"))
    drafts = Drafts(pool, thread, state, Learnt())
    drafts.wanted = True

    def step(tokens, seconds, window=pool.publish):
        drafts.begin(tokens)
        drafts.launched()
        now[0] += seconds
        drafts.end()
        window()
        drafts.take()
        state.frequency.add_(tokens)

    step(2, 8.0)  # before it no window, and no draft of known length
    assert not thread.told
    step(3, 9.0)
    assert thread.told[-1].until == 108 + 3 * 4.0
    assert thread.waits[-1] == 3 * 4.0 - 9.0  # for the copies to begin, while the draft may run
    step(3, 300.0)
    assert thread.waits[-1] == 0
    step(5, 15.0)
    assert thread.told[-1].until == 420 + 5 * 4.0  # of 4, 3, 100
    assert (thread.told[-1].pairs == 3).all() and (thread.told[-1].frequency == 8).all()
    drafts.begin(1)
    drafts.launched()
    pool.publish()  # another text's prompt
    now[0] += 1000
    drafts.end()
    pool.publish()
    drafts.take()
    start = now[0]
    step(1, 1.0)
    assert thread.told[-1].until == start + 3.5  # of 4, 3, 100, 3
    drafts.begin(0)
    drafts.launched()
    assert not pool.quiet
    monkeypatch.setattr("spac.keep.SHORTEST_DRAFT", 50.0)
    told, waits = len(thread.told), len(thread.waits)
    for _ in range(5):  # too short to copy in, but measured
        step(2, 20.0)
    assert len(thread.told) == told and len(thread.waits) == waits and not pool.quiet
    start = now[0]
    step(6, 9.0)
    assert thread.told[-1].until == start + 60.0


class Learnt:
    """In the place of a pull: what it was told, in order."""

    def __init__(self):
        self.told = []

    def check(self):
        pass

    def learn(self, exchanged, pool):
        self.told.append(exchanged.clone())


@pytest.mark.parametrize("draft", [False, True])
def test_the_state_is_read_once(draft):
    """As it was before the window; what that exchanges is for the next one."""
    pool, pull = SlotPool([LAYOUT], 2, torch.device("cpu")), Learnt()
    state = LayerState.new(1, EXPERTS, 1, torch.device("cpu"))
    drafts = Drafts(pool, Thread(), state, pull)
    drafts.wanted = True
    for window in range(4):
        state.exchanged.fill_(window)
        if draft:
            drafts.begin(3)
            assert not pool.quiet
            drafts.launched()
            assert pool.quiet and len(pull.told) == window + 1
        drafts.end()
        assert (state.exchanged == -1).all() and len(pull.told) == window + draft
        pool.publish()
        state.frequency.add_(1)  # the window is under way
        known = drafts.take()
        assert (known.frequency == window).all() and drafts.take() is None
        assert [int(told.unique()) for told in pull.told] == list(range(window + 1))


@pytest.mark.parametrize("later", ["a draft", "no draft"])
def test_a_window_that_came_to_no_end_is_learnt(later):
    """The host knew the state when it began, from a draft; it was launched, and Ctrl-C came."""
    pool, pull = SlotPool([LAYOUT], 2, torch.device("cpu")), Learnt()
    state = LayerState.new(1, EXPERTS, 1, torch.device("cpu"))
    drafts = Drafts(pool, Thread(), state, pull)
    drafts.wanted = True
    drafts.begin(3)
    drafts.launched()
    drafts.end()
    pool.publish()
    state.exchanged.fill_(6)
    if later == "a draft":
        drafts.begin(3)
        drafts.launched()
    drafts.end()
    drafts.take()
    assert [int(told.unique()) for told in pull.told] == [-1, 6]


def test_what_an_interrupted_window_left_is_learnt_first():
    pool, pull = SlotPool([LAYOUT], 2, torch.device("cpu")), Learnt()
    state = LayerState.new(1, EXPERTS, 1, torch.device("cpu"))
    drafts = Drafts(pool, Thread(), state, pull)
    state.exchanged.fill_(5)
    drafts.end()  # and then Ctrl-C
    state.exchanged.fill_(6)
    drafts.end()
    drafts.take()
    assert [int(told.unique()) for told in pull.told] == [5, 6]


def machinery(slots, most):
    """Control, copy thread (which does not run) and pool over random experts."""
    store = HostStore([LAYOUT] * LAYERS, pin=False)
    for _ in range(LAYERS):
        store.allocate()
    config = SpacConfig(rebalance_every=10**6)
    control = Control(config, COSTS, LAYERS, EXPERTS, TOP_K, slots)
    control.keeps = True
    pool = SlotPool([LAYOUT] * LAYERS, slots, torch.device("cpu"))
    copier = CopyThread(pool, store, control, most)
    copier.fill()
    return control, copier, pool


@pytest.mark.parametrize("most", [0, 2])
@pytest.mark.parametrize("seconds", [0, 1, 3, 99])
def test_replay_and_engine_choose_alike(seconds, most, monkeypatch):
    """A copy takes a second, of a clock that stands while the host chooses; nothing streams, so
    that nothing else changes places."""
    monkeypatch.setattr("spac.replay_slots.COPIES_LATER", 0.0)
    rng, slots = np.random.default_rng(), 9
    control, copier, pool = machinery(slots, most)
    policy = make_policy("spac", LAYERS, EXPERTS, slots)
    rounds = Rounds(LAYERS, EXPERTS, slots, COSTS, most, keep=True, draft_copies=True)
    frequency = np.zeros((LAYERS, EXPERTS), dtype=np.int64)
    exchanges = 0
    for window in range(12):
        pool.publish()
        rounds.begin_window(policy, float(seconds if window else 0))
        assert np.array_equal(pool.slot_of >= 0, rounds.resident.reshape(LAYERS, EXPERTS))
        utility = np.zeros((LAYERS, EXPERTS), dtype=np.int32)
        copier._round(Snapshot(window + 1, float(window), utility, frequency.copy()))
        assert copier.wasted == rounds.wasted
        odds = rng.gumbel(size=(4, LAYERS, EXPERTS)) + rng.gumbel(size=(LAYERS, EXPERTS))
        ids = np.argsort(-odds, axis=-1)[..., :TOP_K]
        pairs = np.stack([pair_counts(ids[:, i], EXPERTS) for i in range(LAYERS)]).astype(np.int64)
        frequency += pairs
        for layer in range(LAYERS):
            rounds.choose(layer, pairs[layer].astype(float), policy.pair, 0)
            policy.observe(layer, ids[:, layer])
        rounds.unused[rounds.resident & (pairs.ravel() > 0)] = False  # as `replay` does
        rounds.run(60.0)  # the round's copies arrive within the window
        policy.end_window()
        before = pool.evictions
        pool.quiet = True
        copier._exchange(Idle(frequency.copy(), pairs, time.perf_counter() + seconds + 0.9))
        exchanges += pool.evictions - before
    assert (exchanges > 0) == (seconds > 0)


def test_who_comes_late_does_the_latest():
    _, copier, _ = machinery(4, 2)
    zeros = np.zeros((LAYERS, EXPERTS), dtype=np.int64)
    prompt = np.ones((LAYERS, EXPERTS))
    first = Snapshot(1, 0.0, zeros, zeros, prompt)
    second, stale, fresh = Snapshot(2, 0.0, zeros, zeros), *(Idle(zeros, zeros, t) for t in (1, 2))
    for work in (first, stale, second, fresh):
        copier.submit(work)
    snapshot, idle = copier._latest()
    assert snapshot.window == 2 and snapshot.prompt is prompt and idle is fresh
    for work in (fresh, first):
        copier.submit(work)
    assert copier._latest() == (first, None)
    copier.submit(fresh)
    copier.submit(None)
    assert copier._latest() is None
