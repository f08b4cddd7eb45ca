"""Ctrl-C anywhere in spac: attach gives everything back, detach can be repeated, the
next text is right."""

import contextlib
import threading

import numpy as np
import pytest
import torch

import spac
from spac import ops
from spac.attachment import attachment
from spac.budget import bytes_for_ratio
from spac.config import SpacConfig
from spac.handoff import HandOff
from spac.layout import ExpertLayout, ExpertTable
from spac.testing import fault, interrupted

PROMPT = torch.randint(0, 96, (1, 21), generator=torch.Generator().manual_seed(4))
NEVER = 10**9


@pytest.fixture(autouse=True)
def solver():
    pytest.importorskip("cvxpy")  # imported here, not while a test waits


@pytest.fixture
def small(tiny_moe):
    return tiny_moe(num_hidden_layers=2, num_experts=4)


def settings_and_budget(model, draft=None, **settings):
    settings = {"max_length": 128, "rebalance_every": 2} | settings
    return settings, bytes_for_ratio(model, 0.5, SpacConfig(**settings), draft)


def text(model, new=24, draft="ngram"):
    return spac.generate(model, PROMPT, draft=draft, num_draft_tokens=3, max_new_tokens=new).cpu()


def after_each(step, what):
    """Interrupt `what()` at every `step`th place; goes on after each, until it comes through."""
    for place in range(0, NEVER, step):
        with contextlib.suppress(KeyboardInterrupt), interrupted(after=place) as f:
            what()
        if not f.hits:
            return
        yield place


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def check_as_before(model, before, rounding=0):
    assert attachment(model) is None
    assert not [t.name for t in threading.enumerate() if t.name.startswith("spac-")]
    for name, p in model.named_parameters():
        assert p.is_contiguous() and p.requires_grad, name
        assert (p - before[name]).abs().max() <= rounding * before[name].abs().max(), name


def check_slots(engine):
    """Every expert that the pool tells of is whole, in a slot of its own, and shown."""
    pool = engine.pool
    engine._learn()
    pool.publish()
    slots = pool.slot_of[pool.slot_of >= 0].tolist()
    assert len(set(slots)) == len(slots)
    for layer, expert in zip(*(pool.slot_of >= 0).nonzero(), strict=True):
        slot, blob = int(pool.slot_of[layer, expert]), engine.store.blobs[layer][expert]
        assert torch.equal(pool.memory[slot, : blob.numel()].cpu(), blob), (layer, expert)
    assert pool.address.cpu().ne(0).equal(torch.from_numpy(pool.slot_of >= 0))


@pytest.mark.parametrize("form, rounding", [("float", 0), ("int8", 0.02)])
def test_an_attach_leaves_the_model_as_it_was(small, form, rounding):
    before = weights(small)
    settings, budget = settings_and_budget(small, weights=form)
    spac.detach(spac.attach(small, budget, **settings))  # measures what it costs, once
    for _ in after_each(19, lambda: spac.attach(small, budget, **settings)):
        check_as_before(small, before, rounding)
    assert attachment(small) is not None


def test_a_second_one_while_attach_gives_back_leaves_that_to_detach(small, monkeypatch):
    before, undo = weights(small), spac.attachment._undo
    settings, budget = settings_and_budget(small)
    spac.detach(spac.attach(small, budget, **settings))
    full = MemoryError("full")
    for place in range(0, NEVER, 7):
        with monkeypatch.context() as m, contextlib.ExitStack() as stack:
            stack.enter_context(fault("copy", fail=full))
            stack.enter_context(pytest.raises((KeyboardInterrupt, MemoryError)))
            found = []

            def undone(*args, place=place, found=found):
                with interrupted(after=place) as f:
                    found.append(f)
                    undo(*args)

            m.setattr(spac.attachment, "_undo", undone)
            spac.attach(small, budget, **settings)
        if not found[0].hits:
            break
        spac.detach(small)
        check_as_before(small, before)
    assert place > 20
    check_as_before(small, before)


@pytest.mark.parametrize("static", [False, True])
def test_a_detach_can_be_repeated(small, static):
    before = weights(small)
    settings, budget = settings_and_budget(small, static_windows=static)

    def attached():
        spac.attach(small, budget, **settings)
        text(small, 2)

    attached()
    for _ in after_each(9, lambda: spac.detach(small)):
        if attachment(small) is not None:
            spac.detach(small)
        check_as_before(small, before)
        attached()
    check_as_before(small, before)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU the layers of a static window are in a graph"
)
@pytest.mark.parametrize("way", [{}, {"static_windows": True}, {"stream_missing": True}], ids=str)
def test_the_next_text_is_right(tiny_moe, way):
    """The prompt is longer than max_window: where the link is used, it exchanges slots."""
    model = tiny_moe()
    expected = model.generate(PROMPT, max_new_tokens=24, do_sample=False)
    settings, budget = settings_and_budget(model, max_window=8, **way)
    stops = [NEVER]
    for stop in stops:
        spac.attach(model, budget, **settings)
        with contextlib.suppress(KeyboardInterrupt), interrupted(after=stop) as f:
            text(model)
        if not f.hits:  # the first time: now it is known how many places there are
            stops += range(0, f.calls, f.calls // 12)
        assert torch.equal(text(model), expected), stop
        spac.detach(model)


@pytest.mark.parametrize("static", [False, True])
def test_copies_while_a_draft_runs(tiny_moe, monkeypatch, static):
    """Ctrl-C between the third draft's begin and the first layer of its window: what kernels are
    shown is whole, and the next text is right."""
    monkeypatch.setattr("spac.keep.SHORTEST_DRAFT", 0.0)
    model, draft = tiny_moe(num_hidden_layers=2), tiny_moe(num_hidden_layers=1)
    expected = model.generate(PROMPT, max_new_tokens=24, do_sample=False)
    ways = {"stream_missing": True, "static_windows": static, "max_copies": 2}
    settings, budget = settings_and_budget(model, draft, **ways)
    spac.attach(model, budget, draft=draft, **settings)
    engine = attachment(model).engine
    begin, split = engine.drafts.begin, engine._split
    stack, drafts, found = contextlib.ExitStack(), [], []

    def third(tokens):
        drafts.append(tokens)
        if len(drafts) == 3:
            found.append(stack.enter_context(interrupted(after=place)))
        begin(tokens)

    def layer(*args, **named):
        stack.close()
        return split(*args, **named)

    # On a GPU every text captures graphs anew.
    for place in range(0, NEVER, 28 if static and torch.cuda.is_available() else 7):
        drafts.clear()
        with monkeypatch.context() as m, stack, contextlib.suppress(KeyboardInterrupt):
            m.setattr(engine.drafts, "begin", third)
            m.setattr(engine, "_split", layer)
            text(model, draft=draft)
        check_slots(engine)
        if place % 28 == 0:
            assert torch.equal(text(model, draft=draft), expected), place
        if not found[-1].hits:
            break
    assert place > 60
    spac.detach(model)


def test_what_a_window_has_shown_arrives(tiny_moe, monkeypatch):
    """Ctrl-C while an eager window chooses what streams: what is shown later is whole."""
    model = tiny_moe(num_hidden_layers=2)
    expected = text(tiny_moe(num_hidden_layers=2))
    settings, budget = settings_and_budget(model, stream_missing=True, static_windows=False)
    spac.attach(model, budget, **settings)
    engine = attachment(model).engine
    pool, split = engine.pool, engine._split
    stack, found = contextlib.ExitStack(), []

    def choose(layer, ids):
        if engine.windows == third and layer == 1:
            found.append(stack.enter_context(interrupted(after=place)))
        result = split(layer, ids)
        stack.close()
        return result

    for place in range(NEVER):  # noqa: B007
        third = engine.windows + 3
        with monkeypatch.context() as m, stack, contextlib.suppress(KeyboardInterrupt):
            m.setattr(engine, "_split", choose)
            text(model)
        check_slots(engine)
        if not found[-1].hits:
            break
    assert place > (4 if torch.cuda.is_available() else 30) and pool.kept > 0
    assert torch.equal(text(model), expected)
    spac.detach(model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="graphs hand over without the host")
def test_what_half_a_static_window_exchanged_is_not_forgotten(tiny_moe, monkeypatch):
    """Ctrl-C in its layers: the host, which knew the state when it began from the draft, must not
    take it for the state when the next one begins."""
    monkeypatch.setattr("spac.keep.SHORTEST_DRAFT", 0.0)
    monkeypatch.setattr("spac.split.Split.observe", lambda *_: None)
    model, draft = tiny_moe(), tiny_moe(num_hidden_layers=1)
    settings, budget = settings_and_budget(
        model, draft, stream_missing=True, static_windows=True, max_copies=2
    )
    spac.attach(model, budget, draft=draft, **settings)
    engine = attachment(model).engine
    engine.control.split.streams = (np.arange(17) * 2 // 3).astype(np.int32)
    exchanged = 0
    for place in range(4, 24):  # of three layers' hand-overs
        stop = fault("handed", fail=KeyboardInterrupt("^C"), after=place)
        with stop, contextlib.suppress(KeyboardInterrupt):
            text(model, draft=draft)
        exchanged += int((engine._state.exchanged >= 0).any())
        text(model, 2, None)  # its prompt is a window, from which no draft has been
        check_slots(engine)
    assert exchanged
    spac.detach(model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here torch does the device's part")
def test_worker_and_device_agree_on_the_window():
    """Wherever the window before, of one row, was given up."""
    gate_up, down = torch.randn(4, 12, 16), torch.randn(4, 16, 6)
    table = ExpertTable.from_parameters(ExpertLayout(4, 16, 6, torch.float32), gate_up, down)
    handoff = HandOff([table], 5, 2, torch.float32, torch.zeros(2, dtype=torch.int32))
    for _ in after_each(1, lambda: handoff.begin(1)):
        pairs = torch.randn(5, 16), torch.randint(0, 4, (5, 2), dtype=torch.int32), torch.rand(5, 2)
        handoff.begin(5)
        handoff.send(0, *pairs)
        found = handoff.join(0, torch.zeros(5, 16), pairs[1], torch.float32)
        torch.testing.assert_close(found, ops.expert_ffn_table(*pairs, table), rtol=0, atol=0)
        handoff.check()
    handoff.close()
