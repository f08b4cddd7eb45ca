"""Compiles the small operations around the experts while a window is captured.

A transformers layer runs about forty elementwise kernels (norms, rotary embedding, activation)
whose launches last longer than their work, also inside a CUDA graph. torch.compile makes one or two
of each group. Only the capture sees the compiled functions: the model itself is never changed.
Intermediate results are rounded where the eager functions round them; sums of a norm may be added
in another order.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_MODULES = ("RMSNorm", "MLP")  # how the class names end
_ROTARY = "apply_rotary_pos_emb"  # a function of the model's file
_OPTIONS: dict[str, Any] = {"emulate_precision_casts": True}
_MOST_SHAPES = 64  # of one function: widths, heads, layers of different size


@functools.cache
def _compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    options = _OPTIONS if backend == "inductor" else None
    return torch.compile(function, fullgraph=True, backend=backend, options=options)


@contextmanager
def fused(model: nn.Module, backend: str = "inductor") -> Iterator[None]:
    """Forwards of `model` meanwhile run with compiled norms, rotary embedding and dense MLPs."""
    modules = [m for m in model.modules() if type(m).__name__.endswith(_MODULES)]
    files = {sys.modules[type(m).__module__] for m in model.modules()}
    rotary = {file: vars(file)[_ROTARY] for file in files if _ROTARY in vars(file)}
    with torch._dynamo.config.patch(recompile_limit=_MOST_SHAPES):
        try:
            for module in modules:
                if "forward" not in vars(module):  # nobody else has wrapped it
                    run = _compiled(type(module).forward, backend)
                    module.__dict__["forward"] = functools.partial(run, module)
            for file, function in rotary.items():
                setattr(file, _ROTARY, _compiled(function, backend))
            yield
        finally:
            for module in modules:
                if isinstance(vars(module).get("forward"), functools.partial):
                    del module.__dict__["forward"]
            for file, function in rotary.items():
                setattr(file, _ROTARY, function)
