"""Windows over a static cache, handed to the CPU by flags: same text, errors, no hang."""

import subprocess
import sys
import threading
import time

import pytest
import torch

import spac
from spac.attachment import attachment
from spac.budget import bytes_for_ratio
from spac.config import SpacConfig
from spac.handoff import HandOff
from spac.target import EagerTarget, NotCapturable, StaticTarget
from spac.testing import fault

LENGTH = {"max_length": 128}


def attach(model, ratio=0.3, **settings):
    settings = LENGTH | {"static_windows": True} | settings
    return spac.attach(model, bytes_for_ratio(model, ratio, SpacConfig(**settings)), **settings)


@pytest.fixture
def prompt():
    return torch.randint(0, 96, (1, 21))


@pytest.mark.parametrize("gamma", [0, 3, "auto"])
@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
def test_the_text_is_that_of_the_plain_model(tiny_moe, prompt, ratio, gamma, device):
    plain = spac.generate(tiny_moe().to(device), prompt, max_new_tokens=40).cpu()
    model = attach(tiny_moe(), ratio, rejected_weight=0.5)
    for _ in range(2):  # the second text starts with the cache of the first
        text = spac.generate(
            model, prompt, draft="ngram", num_draft_tokens=gamma, max_new_tokens=40
        )
        assert text.cpu().tolist() == plain.tolist()
    target = attachment(model).targets[id(model)]
    assert not target.reasons
    if device == "cuda":
        assert set(target.captured) >= {1}
    assert spac.stats(model)["windows"] > 0
    spac.detach(model)


def test_logits_are_those_of_the_eager_forward(tiny_moe, prompt, device):
    model = attach(tiny_moe(), 0.4)
    engine = attachment(model).engine
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
    model = attach(tiny_moe(), 0.2)
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


def handoff(device, compute, limit_s=3.0):
    return HandOff(2, 6, 10, 3, torch.float32, torch.device(device), compute, limit_s)


def test_handoff_adds_the_rows_of_the_worker(device):
    def compute(layer, hidden, ids, weights):
        return (layer + 1) * hidden.float() * weights.sum(1, keepdim=True) + ids[:, :1]

    link = handoff(device, compute)
    try:
        for width in (6, 1, 4):
            link.begin(width)
            for layer in range(2):
                x, partial = torch.randn(2, width, 10, device=device)
                ids = torch.randint(-1, 5, (width, 3), dtype=torch.int32, device=device)
                weights = torch.rand(width, 3, device=device)
                link.send(layer, x, ids, weights)
                y = link.join(layer, partial, torch.float32)
                rest = compute(layer, x, ids, weights) if int(ids.max()) >= 0 else 0
                torch.testing.assert_close(y, partial + rest)
            link.check()
    finally:
        link.close()


def test_a_stalled_worker_is_an_error_in_time(device):
    release = threading.Event()

    def stall(layer, hidden, ids, weights):
        release.wait(60)
        return hidden.float()

    link = handoff(device, stall, limit_s=0.2)
    start = time.monotonic()
    link.begin(1)
    for layer in range(2):  # only the first wait takes its time
        rows = torch.ones(1, 10, device=device)
        ids = torch.ones(1, 3, dtype=torch.int32, device=device)
        link.send(layer, rows, ids, torch.ones(1, 3, device=device))
        link.join(layer, rows, torch.float32)
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
