"""Timings of gpu_check: the kernels around the experts (spac.decoder) beside torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spac.bench.kernels import graph_seconds
from spac.kernels.fused_linear import add_norm, fused_gated, fused_linear
from spac.kernels.route import route
from spac.kernels.window_attention import window_attention

# hidden, query heads, key heads, intermediate of the dense MLP (or None), experts (or None)
SHAPES = {"qwen3-30b-a3b": (2048, 32, 4, None, 128), "qwen3-0.6b": (1024, 16, 8, 3072, None)}
D, ROTATE = 128, 8
DEV = "cuda"


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
