"""The full-size benchmark at a small size: every provider computes the same, every row is there."""

import numpy as np
import pytest
import torch

from spac import reference
from spac.bench.__main__ import main
from spac.bench.providers import AllOnCpu, AllResident, EngineProvider, OnDemand
from spac.bench.synthetic import ReplayedRouting, build, cut, tiled
from spac.config import SpacConfig
from spac.cost import CostModel
from spac.quantize import dequantize
from spac.testing import fault
from spac.trace import Trace, save_trace

LAYERS, EXPERTS, TOP_K = 2, 12, 3
COSTS = CostModel(1 << 14, *[1e-6] * 8)


@pytest.fixture
def trace():
    rng = np.random.default_rng()
    noise = rng.gumbel(size=(40, LAYERS, EXPERTS)) + 2 * rng.gumbel(size=(1, LAYERS, EXPERTS))
    ids = np.argsort(-noise, axis=-1)[..., :TOP_K]
    return Trace(ids.astype(np.uint8), EXPERTS, model="made for the test")


def providers(store, device):
    def engine(policy, hot=None):
        config = SpacConfig(policy=policy, max_window=8)
        return EngineProvider(store, 7, TOP_K, device, config, COSTS, hot)

    hot = np.random.default_rng().random((LAYERS, EXPERTS))
    return {
        "spac": engine("spac"),
        "static": engine("static", hot),
        "lru": OnDemand(store, 9, device),
        "slow": OnDemand(store, 9, device, link=1e9),
        "stream": OnDemand(store, 0, device),
        "cpu": AllOnCpu(store),
        "resident": AllResident(store, device),
    }


@pytest.mark.parametrize("form", ["float", "int8", "int4"])
def test_every_provider_computes_the_same(trace, form, device):
    made = build("small", trace, LAYERS, torch.device(device), form)
    layout = made.store.layouts[0]
    running = providers(made.store, made.device)
    try:
        for round in range(12):
            tokens, layer = (5, 1, 20)[round % 3], round % LAYERS
            x = torch.randn(tokens, layout.hidden).to(torch.bfloat16).to(device)
            ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)])
            weights = torch.rand(tokens, TOP_K)
            views = made.store.views(layer)
            if form != "float":
                views = dequantize(views, layout)
            views = {n: v.double() for n, v in views.items()}
            expected = reference.expert_ffn(
                x.cpu().double(), ids, weights, views["gate_up"], views["down"], layout
            )
            for name, provider in running.items():
                y = provider.forward(layer, x, ids.to(device, torch.int32), weights.to(device))
                error = (y.cpu().double() - expected).norm() / expected.norm()
                assert error < 1e-2, (name, round, float(error))
        lru = running["lru"].read()
        assert 0 < lru.resident_pairs < lru.pairs and lru.moved > 0
        assert running["stream"].read().resident_pairs == 0
        assert running["cpu"].read().moved == 0 < running["cpu"].read().cpu_experts
        running["resident"].begin(torch.zeros(LAYERS, 5, TOP_K, device=device))
        resident = running["resident"].read()
        assert resident.pairs == resident.resident_pairs == LAYERS * 5 * TOP_K
    finally:
        for provider in running.values():
            provider.close()
        made.store.close()


def test_the_trace_repeats_with_other_experts_and_layers_map_by_index(trace):
    long = tiled(trace, 100, shift=5)
    assert long.shape == (120, LAYERS, TOP_K)
    assert (long.expert_ids[40:80] == (trace.expert_ids.astype(int) + 5) % EXPERTS).all()
    assert (tiled(trace, 100, shift=20000).expert_ids < EXPERTS).all()
    windows = cut(long, 60, gamma=3, more=2, acceptance=0.5, seed=1)
    assert sum(w.accepted + 1 for w in windows) >= 60
    assert (
        sum(w.accepted + 1 for w in windows[:-3]) < 60 <= sum(w.accepted + 1 for w in windows[:-2])
    )
    routing = ReplayedRouting(trace, 5, torch.device("cpu"))
    ids = routing.window(windows[0].ids)
    assert ids.shape == (5, 4, TOP_K) and ids.dtype == torch.int32
    assert (ids[4].numpy() == windows[0].ids[:, 0]).all()


def test_bench_generate_at_full_size(trace, tmp_path, capsys):
    save_trace(tmp_path / "t.npz", trace)
    argv = ["generate", "--shape", "small", "--trace", str(tmp_path / "t.npz"), "--layers", "2"]
    argv += ["--draft", "small", "--num-draft-tokens", "0", "2", "--prompt-tokens", "40"]
    assert main([*argv, "--tokens", "8", "--warmup", "4", "--cache-ratio", "0.3"]) == 0
    out = capsys.readouterr().out
    for name in ("spac", "spac-eager", "lru", "static", "cpu", "stream", "resident"):
        assert out.count(f"| {name} |") == 2
    assert "weights are random, so text is not" in out and "the best with SD" in out
    assert "the best other (" in out
    assert '"draft_copies": true' in out
    assert "rms against fp64: at most 0.0" in out
    argv += ["--tokens", "4", "--warmup", "2", "--no-draft-copies"]
    assert main([*argv, "--providers", "spac", "accelerate"]) == 0
    out = capsys.readouterr().out
    assert '"draft_copies": false' in out and out.count("| accelerate | - |") == 2


def test_a_wrong_layer_is_noticed(trace, tmp_path, capsys):
    save_trace(tmp_path / "t.npz", trace)
    argv = ["generate", "--shape", "small", "--trace", str(tmp_path / "t.npz"), "--layers", "3"]
    argv += ["--num-draft-tokens", "1", "--prompt-tokens", "40", "--tokens", "4", "--warmup", "2"]
    with fault("layer", change=lambda rows: rows * 1.1):
        assert main([*argv, "--providers", "spac", "accelerate"]) == 1
    assert "more than 0.0078: spac at gamma 1\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "--shape: needs --trace FILE"),
        (["--trace", "x", "--draft", "7b"], "--draft: expected 0.6b, 4b, small or none"),
        (["--trace", "x", "--num-draft-tokens", "auto"], "with --shape numbers only"),
    ],
)
def test_bad_options_are_one_line(options, message, capsys):
    assert main(["generate", "--shape", "small", *options]) == 2
    assert message in capsys.readouterr().err
