"""Sampled layers of a provider at full size against the torch reference."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from spac import reference
from spac.bench.providers import Provider
from spac.bench.synthetic import Synthetic
from spac.quantize import dequantize

LIMIT = 2**-7  # relative, rms; bf16 resolves half of it


def layer_error(made: Synthetic, provider: Provider, ids: Tensor) -> float:
    """The largest rms error, relative, of the first, middle and last layer in one more window.

    ids int32 [L, W, k] on the device; hidden rows and weights are random. A provider that may be
    captured runs as in its graph, without one.
    """
    layers, store = len(ids), made.store
    hidden = torch.randn(ids.shape[1], store.layouts[0].hidden, device=made.device)
    hidden, weights = hidden.bfloat16(), torch.rand(ids.shape[1:], device=made.device)
    engine = provider.engine if provider.static else None
    provider.begin(ids)
    if engine is not None:
        engine.open_handoff(hidden.dtype)
        engine.begin_window(len(hidden))
        engine.by_flags = True
    sampled = {0, layers // 2, layers - 1}
    found = {}
    for layer in range(layers):
        y = provider.forward(layer, hidden, ids[layer], weights)
        if layer in sampled:
            found[layer] = y.double().cpu()
    if engine is not None:
        engine.by_flags = False
        engine.launched()
        engine.check()
    rows, w = hidden.double().cpu(), weights.double().cpu()
    worst = 0.0
    for layer, y in found.items():
        at = layer % (provider.depth or layers)
        used, chosen = ids[layer].cpu().unique(return_inverse=True)
        views = {name: view[used] for name, view in store.views(at).items()}
        layout = replace(store.layouts[at], num_experts=len(used))
        if layout.form != "float":
            views = dequantize(views, layout)
        truth = reference.expert_ffn(rows, chosen, w, views["gate_up"], views["down"], layout)
        error = float((y - truth).norm() / truth.norm())
        worst = max(worst, error if error == error else float("inf"))
    return worst
