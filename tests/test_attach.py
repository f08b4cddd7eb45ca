"""attach, detach, budget and stats on a tiny model."""

import time

import pytest
import torch

import spac
from spac.attachment import attachment
from spac.budget import BudgetTooSmall, bytes_for_ratio
from spac.config import SpacConfig, format_bytes, parse_bytes
from spac.experts import find_experts

LENGTH = {"max_length": 128}


def attach(model, ratio=0.3, **settings):
    config = SpacConfig(**LENGTH | settings)
    return spac.attach(model, bytes_for_ratio(model, ratio, config), **LENGTH | settings)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_attached_model_computes_the_same(tiny_moe, ratio, device):
    model, plain = tiny_moe(), tiny_moe().to(device)
    ids = torch.randint(0, 96, (1, 9), device=device)
    attach(model, ratio)
    with torch.no_grad():
        for _ in range(4):  # residency changes between forwards, the result does not
            torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
        long = torch.randint(0, 96, (1, 50), device=device)  # prefill
        torch.testing.assert_close(model(long).logits, plain(long).logits, rtol=1e-4, atol=1e-4)
    spac.detach(model)


def test_detach_restores_the_model(tiny_moe):
    model = tiny_moe()
    model.lm_head.weight.requires_grad_(False)
    before = {n: (p, p.data.clone(), p.requires_grad) for n, p in model.named_parameters()}
    implementation = model.config._experts_implementation
    attach(model)
    with torch.no_grad():
        model(torch.randint(0, 96, (1, 5), device=model.device))
    spac.detach(model)
    assert model.config._experts_implementation == implementation
    assert attachment(model) is None
    for name, parameter in model.named_parameters():
        original, data, requires_grad = before[name]
        assert parameter is original and parameter.requires_grad == requires_grad
        assert parameter.is_contiguous() and torch.equal(parameter.data, data)
    model(torch.randint(0, 96, (1, 5))).logits.sum().backward()  # trains again


def test_host_store_is_the_only_copy(tiny_moe):
    model = tiny_moe()
    attach(model)
    store = attachment(model).engine.store
    for layer, (_, module) in enumerate(find_experts(model)):
        first = store.blobs[layer].data_ptr()
        assert module.gate_up_proj.data_ptr() == first
        assert first < module.down_proj.data_ptr() < first + store.blobs[layer].nbytes
    state = model.state_dict()
    assert torch.equal(
        state["model.layers.0.mlp.experts.down_proj"].cpu(),
        tiny_moe().model.layers[0].mlp.experts.down_proj,
    )
    spac.detach(model)


def test_stats_are_consistent(tiny_moe):
    model = tiny_moe()
    attach(model, 0.4)
    spac.generate(model, torch.randint(0, 96, (1, 40)), max_new_tokens=80)
    s = spac.stats(model)
    assert s["windows"] == 79 and s["prefill_tokens"] == 40
    assert s["pairs"] == 79 * 3 * 4 and 0 < s["resident_pairs"] <= s["pairs"]
    assert s["coverage"] == s["resident_pairs"] / s["pairs"]
    engine = attachment(model).engine
    engine.copier.close()
    for layer in range(3):
        engine.pool.publish(layer)
    deadline = time.monotonic() + 60  # the first solve imports cvxpy
    while not engine.control.balancer.balancer.solved and time.monotonic() < deadline:
        time.sleep(0.05)
    s = spac.stats(model)
    assert s["loads"] - s["evictions"] == s["resident"] <= s["budget"]["slots"]
    # Twice: what a window kept while it was being copied.
    copies = s["loads"] - s["kept_experts"] - s["budget"]["slots"] + engine.pool.doubled
    assert s["bytes_copied"] == copies * s["budget"]["slot_bytes"]
    assert s["balancer"]["solved"] >= 1 and s["balancer"]["failed"] == 0
    spac.detach(model)


def test_without_a_budget_a_cpu_model_runs_the_cpu_kernels(tiny_moe, device):
    if device == "cuda":
        pytest.skip("a GPU gets slots for every expert")
    model, plain = tiny_moe(), tiny_moe()
    spac.attach(model)
    ids = torch.randint(0, 96, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    assert spac.stats(model) == {"offloaded": False}
    spac.detach(model)


def test_a_budget_too_small_says_what_is_needed(tiny_moe):
    model = tiny_moe()
    with pytest.raises(BudgetTooSmall, match=r"1\.0 KiB given, .* needed .*dense weights .*KV"):
        spac.attach(model, 1024)
    assert attachment(model) is None
    needed = bytes_for_ratio(model, 0, SpacConfig(**LENGTH))
    with pytest.raises(BudgetTooSmall):
        spac.attach(model, needed - 1, **LENGTH)
    spac.attach(model, needed, **LENGTH)
    assert spac.stats(model)["budget"]["slots"] == 1
    spac.detach(model)


def test_refusals_are_one_clear_line(tiny_moe):
    model = tiny_moe()
    with pytest.raises(ValueError, match="no Mixture-of-Experts"):
        spac.attach(torch.nn.Linear(2, 2), "1MB")
    with pytest.raises(ValueError, match="policy: expected one of"):
        spac.attach(model, "8GiB", policy="magic")
    with pytest.raises(ValueError, match="not attached"):
        spac.detach(model)
    with pytest.raises(ValueError, match="not attached"):
        spac.stats(model)
    attach(model)
    with pytest.raises(ValueError, match="attached already"):
        attach(model)
    spac.detach(model)


def test_another_gpu_must_be_the_current_one(tiny_moe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    model = tiny_moe()
    with pytest.raises(ValueError, match=r"device cuda:1 .* torch.cuda.set_device\(1\) first"):
        spac.attach(model, "1GiB", device="cuda:1")
    assert attachment(model) is None


def test_a_broken_copy_thread_is_an_error_not_a_hang(tiny_moe):
    model = tiny_moe()
    attach(model)
    engine = attachment(model).engine
    engine.control.scores = lambda: 1 / 0
    with pytest.raises(RuntimeError, match="copy thread stopped: division by zero"):
        spac.generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=200)
    spac.detach(model)
    assert spac.generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=3).shape == (1, 6)


@pytest.mark.parametrize(
    "text, size",
    [("8GiB", 8 << 30), ("500 MB", 500_000_000), ("1.5g", 1_500_000_000), (7, 7), ("12", 12)],
)
def test_parse_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-3GiB", "8 apples", -1, 1.5, True])
def test_parse_bytes_refuses(text):
    with pytest.raises(ValueError, match="size: "):
        parse_bytes(text)


def test_format_bytes():
    assert [format_bytes(n) for n in (12, 1536, 8 << 30, 3 << 42)] == [
        "12 B",
        "1.5 KiB",
        "8.0 GiB",
        "12.0 TiB",
    ]
