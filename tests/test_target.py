"""Windows over a static cache, handed to the CPU by flags: same text, errors, no hang."""

import gc
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import pytest
import torch

import spac
from spac import ops
from spac.attachment import attachment
from spac.budget import bytes_for_ratio
from spac.config import SpacConfig
from spac.handoff import HandOff
from spac.layout import ExpertLayout
from spac.pool import SlotPool
from spac.store import HostStore
from spac.target import CUTS, EagerTarget, NotCapturable, StaticTarget
from spac.testing import fault

LENGTH = {"max_length": 128}


def attach(model, ratio=0.3, **settings):
    settings = LENGTH | {"static_windows": True} | settings
    return spac.attach(model, bytes_for_ratio(model, ratio, SpacConfig(**settings)), **settings)


@pytest.fixture
def prompt():
    return torch.randint(0, 96, (1, 21))


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("gamma", [0, 3, "auto"])
@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
def test_the_text_is_that_of_the_plain_model(tiny_moe, prompt, ratio, gamma, streams, device):
    plain = spac.generate(tiny_moe().to(device), prompt, max_new_tokens=40).cpu()
    model = attach(tiny_moe(), ratio, rejected_weight=0.5, stream_missing=streams)
    engine = attachment(model).engine
    if streams and ratio < 1:
        engine.streams.copy_(torch.arange(len(engine.streams)) * 2 // 3)
    for _ in range(2):  # the second text starts with the cache of the first
        text = spac.generate(
            model, prompt, draft="ngram", num_draft_tokens=gamma, max_new_tokens=40
        )
        assert text.cpu().tolist() == plain.tolist()
    target = attachment(model).targets[id(model)]
    assert not target.reasons
    if device == "cuda":
        assert set(target.captured) >= {1}
    stats = spac.stats(model)
    assert stats["windows"] > 0 and bool(stats["streamed_experts"]) == (streams and ratio < 1)
    if streams and ratio == 0.4:  # what the GPU reads stays
        assert 0 < stats["kept_experts"] <= stats["streamed_experts"]
    spac.detach(model)


@pytest.mark.parametrize("layers", [1, 2, CUTS[1] + 1, CUTS[1] + 3])
def test_a_window_runs_in_graphs_of_some_layers(tiny_moe, prompt, layers, device):
    sizes = {"num_hidden_layers": layers}
    plain = spac.generate(tiny_moe(**sizes).to(device), prompt, max_new_tokens=30).cpu()
    model = attach(tiny_moe(**sizes), 0.4, stream_missing=True)
    engine = attachment(model).engine
    engine.streams.copy_(torch.arange(len(engine.streams)) // 2)
    text = spac.generate(model, prompt, draft="ngram", num_draft_tokens=3, max_new_tokens=30)
    assert text.cpu().tolist() == plain.tolist()
    if device == "cuda":
        windows = attachment(model).targets[id(model)]._windows.values()
        ends = {*CUTS, layers - 1} & set(range(1, layers))
        assert {len(w.graphs) for w in windows} == {1 + len(ends)}
    spac.detach(model)


def test_logits_are_those_of_the_eager_forward(tiny_moe, prompt, device):
    model = attach(tiny_moe(), 0.4, stream_missing=True)
    engine = attachment(model).engine
    engine.streams.copy_(torch.arange(len(engine.streams)) // 2)
    eager, static = EagerTarget(model), StaticTarget(model, engine, 128)
    prompt = prompt[0].to(device)
    with torch.no_grad():
        for target in (eager, static):
            target.prefill(prompt)
        for width, rejected in ((4, 2), (1, 0), (4, 4), (7, 1), (4, 0)):
            window = torch.randint(0, 96, (width,), device=device)
            expected = eager.verify(window).clone()
            actual = static.verify(window)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
            eager.finish(rejected)
            static.finish(rejected)
    engine.close()
    spac.detach(model)


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_draft_runs_over_a_static_cache_too(tiny_moe, prompt, device, do_sample):
    draft = tiny_moe(num_hidden_layers=1).to(device)
    options = {"do_sample": do_sample, "seed": 5, "max_new_tokens": 40}
    plain = spac.generate(tiny_moe().to(device), prompt, **options).cpu()
    model = attach(tiny_moe(), 0.4)
    for helper in (draft, tiny_moe().to(device)):  # many and few rejections
        for gamma in (3, "auto"):
            text = spac.generate(model, prompt, draft=helper, num_draft_tokens=gamma, **options)
            assert text.cpu().tolist() == plain.tolist()
        assert id(helper) in attachment(model).targets
    spac.detach(model)


def test_delays_anywhere_change_nothing(tiny_moe, prompt, device):
    plain = spac.generate(tiny_moe().to(device), prompt, max_new_tokens=24).cpu()
    model = attach(tiny_moe(), 0.4)
    with fault("copy", delay=0.01), fault("cpu side", delay=0.003) as side:
        text = spac.generate(model, prompt, draft="ngram", num_draft_tokens=2, max_new_tokens=24)
    assert side.hits and text.cpu().tolist() == plain.tolist()
    spac.detach(model)


def test_a_cpu_side_that_fails_is_an_error(tiny_moe, prompt):
    model = attach(tiny_moe(), 0.2, stream_missing=False)
    broken = pytest.raises(RuntimeError, match="the CPU side failed: bus error")
    with fault("cpu side", fail=OSError("bus error"), after=5), broken:
        spac.generate(model, prompt, max_new_tokens=24)
    spac.detach(model)
    assert spac.generate(model, prompt, max_new_tokens=3).shape == (1, 24)


def test_a_text_that_does_not_fit_the_cache_runs_eagerly(tiny_moe, prompt, caplog):
    model = attach(tiny_moe(), max_length=64)
    spac.generate(model, prompt, max_new_tokens=30)
    assert "more than max_length=64" in caplog.text
    assert not attachment(model).targets
    spac.detach(model)


def test_models_that_cannot_run_it_say_why(tiny_moe):
    model = tiny_moe(use_sliding_window=True, sliding_window=16)
    with pytest.raises(NotCapturable, match="cannot be rolled back"):
        StaticTarget(model, None, 64)


LAYOUT = ExpertLayout(num_experts=5, hidden=10, intermediate=6, dtype=torch.float32)


def handoff(device, limit_s=30.0):
    store = HostStore([LAYOUT] * 2, pin=device == "cuda")
    for _ in range(2):
        store.allocate().view(torch.float32).normal_()
    tables = [store.table(layer) for layer in range(2)]
    waited = torch.zeros(len(tables), dtype=torch.int32, device=device)
    return HandOff(tables, 6, 3, torch.float32, waited, limit_s), store, tables


def window(link, device, width, busy=(0, 1)):
    """Both layers of one window: partial sums and pairs given, and what came back. busy: the layers
    of which the CPU has pairs."""
    link.begin(width)
    for layer in range(2):
        x, partial = torch.randn(2, width, 10, device=device)
        ids = torch.full((width, 3), -1, dtype=torch.int32, device=device)
        if layer in busy:
            ids.random_(-1, 5)
            ids[-1, 1] = 2
        weights = torch.rand(width, 3, device=device)
        link.send(layer, x, ids, weights)
        yield layer, x, ids, weights, partial, link.join(layer, partial, ids, torch.float32)


def check_window(link, device, tables, width, busy=(0, 1)):
    for layer, x, ids, weights, partial, y in window(link, device, width, busy):
        rest = ops.expert_ffn_table(x.cpu(), ids.cpu(), weights.cpu(), tables[layer])
        torch.testing.assert_close(y.cpu(), partial.cpu() + rest)
    link.check()


def test_handoff_adds_the_rows_of_the_worker(device):
    link, _store, tables = handoff(device)
    try:
        for width in (6, 1, 4):
            check_window(link, device, tables, width)
            assert (link.times[:, 1] >= link.times[:, 0]).all()
    finally:
        link.close()


def test_the_worker_is_not_asked_where_it_has_nothing_to_do(device):
    link, _store, tables = handoff(device)
    try:
        with fault("cpu side") as asked:
            for busy in ((), (0,), (1,), (), (1,), (0, 1), (0,), (), ()) * 5:
                before = asked.calls
                check_window(link, device, tables, int(torch.randint(1, 7, ())), busy)
                assert asked.calls - before == len(busy)
    finally:
        link.close()


def test_a_window_given_up_does_not_disturb_the_next(device):
    link, _store, tables = handoff(device)
    try:
        check_window(link, device, tables, 2)
        link.begin(3)  # the device never comes
        check_window(link, device, tables, 5)
        next(window(link, device, 6))  # the device stops after one layer
        check_window(link, device, tables, 1)
    finally:
        link.close()


def test_a_stalled_worker_is_an_error_in_time(device):
    link, _store, _ = handoff(device, limit_s=0.2)
    release = threading.Event()
    with fault("cpu side", change=lambda _: release.wait(60)):
        start = time.monotonic()
        list(window(link, device, 1))  # only the first wait takes its time
        if device == "cuda":
            torch.cuda.synchronize()
        with pytest.raises(RuntimeError, match="did not answer in time"):
            link.check()
        assert time.monotonic() - start < 30
        release.set()
        link.close()


def test_windows_are_prepared_once_and_not_counted_as_decoding(tiny_moe, prompt, device):
    model = tiny_moe().to(device)
    attach(model)
    options = {"draft": "ngram", "num_draft_tokens": 3, "max_new_tokens": 12}
    runs = [spac.generate(model, prompt, return_result=True, **options) for _ in range(2)]
    assert runs[0].capture_seconds > 0
    assert runs[1].capture_seconds == 0
    assert all(run.decode_seconds > 0 for run in runs)
    assert spac.stats(model)["generation"]["capture_seconds"] == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_copy_gets_into_a_capture(tiny_moe):
    """torch hands out its streams in turn; a copy on one that captures would not happen."""
    layout = ExpertLayout(4, 8, 8, torch.float32)
    target = StaticTarget(tiny_moe().cuda(), None, 64)
    pools = [SlotPool([layout], 1, torch.device("cuda")) for _ in range(40)]
    copying = {pool.stream.cuda_stream for pool in pools}
    assert len(copying) < 40 and target._stream.cuda_stream not in copying


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_capture_that_fails_leaves_torch_usable(tiny_moe, monkeypatch):
    target = StaticTarget(tiny_moe().cuda(), None, 64)
    forward = target._forward

    def waits(tokens, keep=0):
        logits = forward(tokens, keep)
        logits.sum().item()  # not in a capture
        return logits

    monkeypatch.setattr(target, "_forward", waits)
    target.prepare(2)
    assert target.captured == [] and len(target.reasons) == 1
    assert torch.rand(3, device="cuda").isfinite().all()
    graph, drawn = torch.cuda.CUDAGraph(), torch.zeros(8, device="cuda")
    with torch.cuda.graph(graph):
        drawn.uniform_(1, 2)
    graph.replay()
    assert (drawn >= 1).all()


def test_a_process_may_end_with_a_model_attached():
    """The worker waits inside C++, where Python must not end it."""
    program = """
import spac
from spac.demo_model import load_demo
model, draft, tokenizer = load_demo()
spac.attach(model, gpu_budget="64MB", draft=draft, max_length=256, static_windows=True)
spac.generate(model, tokenizer("def f(", return_tensors="pt").input_ids, max_new_tokens=3)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr[-2000:]


class _Nothing:
    """In the place of what CUDA has; notes what is captured."""

    inside: list[str] = []

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        self.inside.append("graph")

    def __exit__(self, *error):
        pass

    def wait_stream(self, other):
        pass


@pytest.mark.parametrize("fails", [False, True])
def test_layers_cut_a_capture(tiny_moe, monkeypatch, fails):
    """Without a GPU: what is captured where, and what is left behind."""
    model = tiny_moe(num_hidden_layers=4)
    target, inside = StaticTarget(model, None, 64), []
    monkeypatch.setattr(_Nothing, "inside", inside)
    for name in ("Stream", "current_stream", "stream", "synchronize", "graph", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, _Nothing)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    target._pool = target._stream = None
    layers = model.model.layers
    target._cuts = [layers[1], layers[3]]
    seen = [
        layer.register_forward_hook(lambda *_, i=i: inside.append(f"layer {i}"))
        for i, layer in enumerate(layers)
    ]

    def fail(*_):
        if fails and inside.count("graph") == 4:
            raise ZeroDivisionError

    seen.append(layers[3].register_forward_hook(fail))
    window = target._prepare(2)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        target._capture(window, 2, own_lengths=False)
    warm_up = ["graph", *(f"layer {i}" for i in range(4))]  # that one is a stream
    captured = ["graph", "layer 0", "graph", "layer 1", "layer 2", "graph", "layer 3"]
    assert inside == warm_up + captured
    assert len(window.graphs) == (0 if fails else 3)
    for hook in seen:
        hook.remove()
    assert gc.isenabled() and not any(layer._forward_pre_hooks for layer in layers)
    assert (target._lengths == 0).all()
