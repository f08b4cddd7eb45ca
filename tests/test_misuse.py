"""What people do with an attached model besides generating, in turn: right, or one clear error."""

import threading
import time

import numpy as np
import pytest
import torch

import spac
from spac.attachment import attachment
from spac.budget import bytes_for_ratio
from spac.capture import Recorder
from spac.config import SpacConfig
from spac.layout import ExpertLayout
from spac.store import HostStore

PROMPT = torch.randint(0, 96, (1, 21), generator=torch.Generator().manual_seed(4))
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="what is tested has no GPU")


def attach(model, ratio=0.4, draft=None, **settings):
    settings = {"max_length": 128, "rebalance_every": 4} | settings
    budget = bytes_for_ratio(model, ratio, SpacConfig(**settings), draft)
    return spac.attach(model, budget, draft=draft, **settings)


def text(model, draft=None, new=24, **options):
    return spac.generate(model, PROMPT, draft=draft, max_new_tokens=new, **options).cpu()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("max_window, gamma", [(1, "auto"), (4, 9), (8, "auto")])
def test_drafts_are_no_longer_than_a_window(tiny_moe, device, static, max_window, gamma):
    expected = text(tiny_moe().to(device))
    model = attach(tiny_moe(), max_window=max_window, static_windows=static)
    draft = tiny_moe().to(model.device)  # all is accepted
    result = spac.generate(
        model, PROMPT, draft=draft, num_draft_tokens=gamma, max_new_tokens=24, return_result=True
    )
    assert torch.equal(result.sequences.cpu(), expected)
    longest = max(result.gammas)
    assert longest == max_window - 1 if gamma == 9 else longest < max_window
    spac.detach(model)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("inside", ["model", "attach", "generate", "detach"])
def test_inference_mode_may_come_and_go(tiny_moe, device, static, inside):
    def maybe(step):
        return torch.inference_mode(step == inside or step == "attach" and inside == "model")

    expected = text(tiny_moe().to(device))
    with torch.inference_mode(inside == "model"):
        model = tiny_moe()
    with maybe("attach"):
        attach(model, static_windows=static, rejected_weight=0.5)
    for _ in range(2):
        with maybe("generate"):
            assert torch.equal(text(model, "ngram"), expected)
        assert torch.equal(text(model, "ngram"), expected)
    with maybe("detach"):
        spac.detach(model)
    assert all(p.requires_grad for p in model.parameters())
    with torch.set_grad_enabled(inside != "model"):
        total = model(PROMPT).logits.sum()
    if inside != "model":
        total.backward()


@torch.no_grad()
def _merge(model, other):
    for layer, new in zip(model.model.layers, other.model.layers, strict=True):
        layer.mlp.experts.gate_up_proj.add_(new.mlp.experts.gate_up_proj)


CHANGES = {
    "half": lambda model, other: model.half(),
    "merged": lambda model, other: _merge(model, other),
    "cast": lambda model, other: setattr(
        p := model.model.layers[1].mlp.experts.down_proj, "data", p.data.bfloat16()
    ),
}


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_are_an_error(tiny_moe, static, change):
    """Slots would go on with the old ones. What detach gives back is what they are now."""
    model, plain, other = tiny_moe(), tiny_moe(), tiny_moe(seed=5)
    attach(model, static_windows=static)
    text(model)
    for each in (model, plain):
        CHANGES[change](each, other)
    layer = 1 if change == "cast" else 0
    message = f"experts of layer {layer} were moved, converted or changed .* spac.detach"
    for forward in (text, lambda model: model(PROMPT.to(model.device))):
        with pytest.raises(RuntimeError, match=message):
            forward(model)
    spac.detach(model)
    for (name, now), then in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert now.dtype == then.dtype and torch.equal(now, then), name


def test_dense_weights_may_change(tiny_moe, device):
    """Also what a graph was captured with."""
    model, plain, draft = tiny_moe(), tiny_moe().to(device), tiny_moe(num_hidden_layers=1)
    attach(model, draft=draft, static_windows=True)
    text(model, draft)
    draft.half()
    for each in (model, plain):
        head = each.lm_head.weight
        head.data = head.data.roll(1, 0)
    assert torch.equal(text(model, draft), text(plain))
    spac.detach(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_moved_away_is_an_error(tiny_moe):
    model = attach(tiny_moe())
    model.cpu()
    with pytest.raises(RuntimeError, match="the model was moved while attached; call spac.detach"):
        model(PROMPT)
    spac.detach(model)


@NO_GPU
def test_another_thread_does_not_get_between(tiny_moe):
    """A forward of its own, while a static window is under way, would ring the window's bells."""
    model = attach(tiny_moe(), static_windows=True)
    expected, refused, calls = text(tiny_moe()), [], []

    def other():
        with pytest.raises(RuntimeError, match="already running a forward in another thread"):
            model(PROMPT)
        refused.append(0)

    def layer(*_):
        calls.append(0)
        if len(calls) % 7 == 0 and threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    hook = model.model.layers[1].register_forward_pre_hook(layer)
    assert torch.equal(text(model), expected) and len(refused) > 2
    hook.remove()
    spac.detach(model)


@NO_GPU
def test_a_forward_between_the_layers_of_another(tiny_moe, monkeypatch):
    """What the windows of each exchange is learnt before the other's do so in the same layer."""
    monkeypatch.setattr("spac.split.Split.observe", lambda *_: None)
    model, plain = tiny_moe(), tiny_moe()
    attach(model, 0.5, stream_missing=True, static_windows=False, max_copies=0)
    engine = attachment(model).engine
    engine.control.split.streams = (np.arange(17) * 2 // 3).astype(np.int32)
    ids = torch.randint(0, 96, (40, 1, 7))
    kept, depth, own = engine.pool.kept, [], iter(ids[20:])

    def between(*_):
        if not depth:
            depth.append(0)
            model(next(own))
            depth.clear()

    hook = model.model.layers[2].register_forward_pre_hook(between)
    with torch.no_grad():
        for window in ids[:20]:
            found = model(window).logits
            torch.testing.assert_close(found, plain(window).logits, rtol=1e-3, atol=1e-3)
            engine._learn()
            shown, slots = engine.pool.address.numpy(), engine.pool.slot_of
            assert np.array_equal(shown != 0, slots >= 0)
    hook.remove()
    assert engine.pool.kept > kept
    spac.detach(model)


@NO_GPU
def test_threads_sleep_when_a_window_was_given_up():
    """As of a worker beside a GPU, whose threads stay awake during a window."""
    layout = ExpertLayout(4, 8, 8, torch.float32)
    store = HostStore([layout] * 2, pin=False)
    tables = [(store.allocate(), store.table(layer))[1] for layer in range(2)]
    flags, ids = torch.zeros(2, 2, dtype=torch.int32), torch.zeros(512, 4, dtype=torch.int32)
    x, weights, back = torch.randn(512, 8), torch.rand(512, 4), torch.empty(512, 8)
    times = torch.zeros(2, 2, dtype=torch.int64)
    torch.ops.spac.set_cpu_threads(4)
    worker = torch.ops.spac.worker_new(flags, x, ids, weights, back, times, True)
    try:
        for table in tables:
            torch.ops.spac.worker_add_layer(worker, *table.for_cpu())
        torch.ops.spac.worker_start(worker)
        flags[0, 0] = 2 * torch.ops.spac.worker_begin(worker, 512, 0) + 1
        assert torch.ops.spac.wait_flag(flags[1], 0, 1, 30.0)  # and the device never comes again
        deadline, busy = time.monotonic() + 30, 1.0
        while busy > 0.3 and time.monotonic() < deadline:
            start, cpu = time.monotonic(), time.process_time()
            time.sleep(0.3)
            busy = (time.process_time() - cpu) / (time.monotonic() - start)
        assert busy <= 0.3
        flags[0] = 2 * torch.ops.spac.worker_begin(worker, 512, 0) + 1
        assert torch.ops.spac.wait_flag(flags[1], 1, 2, 30.0)
    finally:
        torch.ops.spac.worker_stop(worker)
        torch.ops.spac.set_cpu_threads(0)


class FailingCapture:
    """In the place of torch.cuda.graph, of a capture that cannot end."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        torch.cuda.set_stream("the capture's")

    def __exit__(self, *_):
        raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, None], ids=str)
def test_a_capture_that_fails_says_why_and_gives_the_stream_back(monkeypatch, error):
    stream = ["mine"]
    for name, fake in {
        "graph": FailingCapture,
        "CUDAGraph": object,
        "current_stream": lambda: stream[-1],
        "set_stream": stream.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    with pytest.raises(error or RuntimeError), Recorder(None, None):
        assert stream[-1] == "the capture's"
        if error is not None:
            raise error
    assert stream[-1] == "mine"


def test_what_was_undone_has_taken_no_time(tiny_moe):
    """A warm-up is no window whose times the split may learn from."""
    model = attach(tiny_moe(), stream_missing=True, static_windows=True)
    text(model)
    engine = attachment(model).engine
    assert engine._clock.times is not None
    engine.load(engine.save())
    assert engine._clock.times is None
    spac.detach(model)
