"""Timings of gpu_check: the kernels around the experts (spac.decoder) beside torch, and whole steps
of them with and without programmatic dependent launch (kernels/pdl.py)."""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3MoeConfig

from spac.bench.kernels import graph_seconds
from spac.decoder import few_launches
from spac.kernels import pdl
from spac.kernels.fused_linear import add_norm, fused_gated, fused_linear
from spac.kernels.route import route
from spac.kernels.window_attention import window_attention
from spac.target import StaticTarget

# hidden, query heads, key heads, intermediate of the dense MLP (or None), experts (or None)
SHAPES = {"qwen3-30b-a3b": (2048, 32, 4, None, 128), "qwen3-0.6b": (1024, 16, 8, 3072, None)}
D, ROTATE = 128, 8
DEV = "cuda"
MODES = {"none": pdl.OFF, "wait": pdl.WAIT, "weights": pdl.WEIGHTS}
CACHED, ROUNDS = 600, 200


def decoder(report: Any) -> list[str]:
    """A line for each kernel, shape and width: us of ours and of torch, GB/s of what ours reads."""
    lines = []
    for shape, (H, heads, kv, inter, experts) in SHAPES.items():
        matrices = {"qkv": [heads * D, kv * D, kv * D], "out": [H]}
        if experts is not None:
            matrices["router"] = [experts]
        for W in (1, 9):
            for name, rows in matrices.items():
                K = heads * D if name == "out" else H
                lines.append(_linear(report, f"{shape} {name} W={W}", W, K, rows))
            if inter is not None:
                lines.append(_gated(report, f"{shape} gate-up W={W}", W, H, inter))
                lines.append(_linear(report, f"{shape} down W={W}", W, inter, [H]))
            for length in (128, 640, 4000):
                name = f"{shape} attention W={W} L={length}"
                lines.append(_attention(report, name, W, heads, kv, length))
    x, weight = _random(9, 2048), _random(2048)[0]
    parts = [t.float() for t in _random(4, 9, 2048)]
    norm = lambda r: add_norm(x[r], parts[r], weight, 1e-6)  # noqa: E731
    lines.append(_line(report, "sum and norm W=9", norm, None, 0))
    logits = [t.float() for t in _random(8, 9, 128)]
    choose = lambda r: route(logits[r], 8, True, torch.bfloat16, True)  # noqa: E731
    lines.append(_line(report, "route W=9", choose, None, 0))
    return lines


def _random(*shape: int) -> list[Tensor]:
    return [torch.randn(shape, device=DEV, dtype=torch.bfloat16) / 8 for _ in range(ROTATE)]


def _line(report: Any, name: str, ours: Any, torchs: Any, nbytes: float) -> str:
    us = {}
    for label, call in (("", ours), (", torch", torchs)):
        seconds = None if call is None else report.part(name + label, lambda c=call: _time(c))
        us[label] = "       -" if seconds is None else f"{seconds * 1e6:8.2f}"
        if not label and seconds and nbytes:
            name += f"  {nbytes / seconds / 1e9:6.0f} GB/s"
    return f"{name:52s} {us['']} us, torch {us[', torch']}"


def _time(call: Any) -> float:
    return graph_seconds(call, 0.05, ROTATE)


def _linear(report: Any, name: str, W: int, K: int, rows: list[int]) -> str:
    x = _random(W, K)
    weights = [list(ws) for ws in zip(*(_random(n, K) for n in rows), strict=True)]
    return _line(
        report,
        name,
        lambda r: fused_linear(x[r], weights[r]),
        lambda r: [F.linear(x[r], w) for w in weights[r]],
        2.0 * K * sum(rows),
    )


def _gated(report: Any, name: str, W: int, K: int, N: int) -> str:
    x, gate, up = _random(W, K), _random(N, K), _random(N, K)
    return _line(
        report,
        name,
        lambda r: fused_gated(x[r], gate[r], up[r], "silu"),
        lambda r: F.silu(F.linear(x[r], gate[r])) * F.linear(x[r], up[r]),
        4.0 * K * N,
    )


def _attention(report: Any, name: str, W: int, heads: int, kv: int, length: int) -> str:
    """torch: only the attention, over the whole cache with a mask, as transformers has it."""
    room = length + 64
    cos, sin = _random(W, D), _random(W, D)
    qkv = [t.float() for t in _random(2, W, (heads + 2 * kv) * D)]
    keys, values = _random(kv, room, D), _random(kv, room, D)
    norm, n = torch.ones(D, device=DEV, dtype=torch.bfloat16), torch.tensor(length, device=DEV)
    q = _random(1, kv, heads // kv * W, D)
    hidden = torch.arange(room, device=DEV) > length + torch.arange(W, device=DEV)[:, None]
    mask = torch.zeros(hidden.shape, device=DEV, dtype=torch.bfloat16)
    mask = mask.masked_fill(hidden, -1e30).repeat(heads // kv, 1)[None, None]
    return _line(
        report,
        name,
        lambda r: window_attention(
            qkv[r], cos[r], sin[r], norm, norm, 1e-6, keys[r], values[r], n, D**-0.5
        ),
        lambda r: F.scaled_dot_product_attention(
            q[r], keys[r][None], values[r][None], attn_mask=mask
        ),
        4.0 * kv * D * length,
    )


def steps(report: Any) -> list[str]:
    """Forwards of random models in CUDA graphs, the modes of kernels/pdl.py taking turns: median us
    of a step. Every mode must give the same bits in each of the ROUNDS steps."""
    lines = []
    draft = Qwen3Config(**_sizes("qwen3-0.6b"), num_hidden_layers=28, vocab_size=151936)
    lines += _steps(report, "qwen3-0.6b, a step", draft, (1, 2), 1)
    layers = 24
    target = Qwen3MoeConfig(
        **_sizes("qwen3-30b-a3b"), num_hidden_layers=layers, vocab_size=1024,
        num_experts=SHAPES["qwen3-30b-a3b"][-1], num_experts_per_tok=8, moe_intermediate_size=8,
        norm_topk_prob=True,
    )  # fmt: skip
    lines += _steps(report, "qwen3-30b-a3b, a layer without experts", target, (1, 9), layers)
    return lines


def _sizes(shape: str) -> dict[str, Any]:
    H, heads, kv, inter, _ = SHAPES[shape]
    sizes = {"hidden_size": H, "num_attention_heads": heads, "num_key_value_heads": kv}
    sizes |= {"head_dim": D, "max_position_embeddings": 4096, "tie_word_embeddings": True}
    return sizes | ({} if inter is None else {"intermediate_size": inter})


class NoExperts(nn.Module):
    """In place of the experts, to time what is around them."""

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return hidden


def make_model(config: Any, device: str = DEV) -> PreTrainedModel:
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for layer in model.base_model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = NoExperts()
    return model


def _steps(report: Any, name: str, config: Any, widths: tuple[int, ...], layers: int) -> list[str]:
    model = make_model(config)
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())  # the head is tied
    lines = [f"{name}: {nbytes / 4.3e6 / layers:.1f} us for its bytes at 4.3 TB/s"]
    for width in widths:
        label = f"{name}, W={width}"
        times = report.part(label, lambda w=width: compare_modes(model, w))
        for mode, seconds in ({} if times is None else times).items():
            lines.append(f"  {label}, early start: {mode:8s} {seconds * 1e6 / layers:8.1f} us")
    return lines


@torch.no_grad()
def compare_modes(model: PreTrainedModel, width: int) -> dict[str, float]:
    """Median seconds of a graph of each mode. Raises AssertionError if their logits differ."""
    prompt = torch.randint(0, model.config.vocab_size, (CACHED,), device=DEV)
    targets, chosen = {}, pdl.MODE
    try:
        for mode, value in MODES.items():
            pdl.MODE = value
            target = targets[mode] = StaticTarget(model, None, CACHED + 100)
            target.prefill(prompt)
            target.prepare(width)
            if few_launches not in target._ways or width not in target.captured:
                raise AssertionError(f"{mode}: not captured: {target.reasons}")
    finally:
        pdl.MODE = chosen
    first = targets["none"]
    for target in targets.values():
        for ours, theirs in zip(target.cache.layers, first.cache.layers, strict=True):
            ours.keys.copy_(theirs.keys)
            ours.values.copy_(theirs.values)
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(ROUNDS):
        tokens = torch.randint(0, model.config.vocab_size, (width,), device=DEV)
        logits = {}
        for mode, target in targets.items():
            window: Any = target._windows[width]
            window.tokens.copy_(tokens)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for graph in window.graphs:
                graph.replay()
            end.record()
            end.synchronize()
            times[mode].append(begin.elapsed_time(end) * 1e-3)
            logits[mode] = window.logits.clone()
            target.finish(width)
        for mode, found in logits.items():
            if not torch.isfinite(found).all() or not torch.equal(found, logits["none"]):
                raise AssertionError(f"{mode}: other logits than without an early start")
    return {mode: statistics.median(seconds) for mode, seconds in times.items()}
