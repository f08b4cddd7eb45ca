"""Finds the experts of a transformers model and reads their layout, or refuses it by name.

The layout flags (`has_gate`, `is_transposed`, ...) are set by transformers'
`use_experts_implementation` (transformers/integrations/moe.py). Activations are recognised by
what they compute, not by their name: a module's own `_apply_gate` is evaluated on probe values
and must match one of `spac.layout.ACTIVATIONS`, so an overridden gate is never silently wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spac import reference
from spac.config import SpacConfig
from spac.layout import ACTIVATIONS, DTYPES, ExpertLayout

Experts = Any  # an experts module of transformers, whose attributes no class declares

WEIGHTS = {
    "gate_up": "gate_up_proj",
    "down": "down_proj",
    "gate_up_bias": "gate_up_proj_bias",
    "down_bias": "down_proj_bias",
}


class UnsupportedLayout(ValueError):
    """The experts of this model are stored or gated in a way that spac does not compute."""


def is_experts(module: nn.Module) -> bool:
    """True for a module that transformers dispatches through its experts interface."""
    return hasattr(module, "has_gate") and hasattr(module, "is_concatenated")


def find_experts(model: nn.Module) -> list[tuple[str, Experts]]:
    """The (name, experts module) of every MoE layer, in order of the layers."""
    return [(name, m) for name, m in model.named_modules() if is_experts(m)]


def expert_layout(module: Experts) -> ExpertLayout:
    """Layout of an experts module, kept on it until its weights have another shape or dtype.

    Raises UnsupportedLayout naming the module's class and the property that is not supported.
    """
    weights = module.gate_up_proj if module.has_gate else None
    shape, dtype, layout = module.__dict__.get("_spac_layout", (None, None, None))
    if weights is not None and weights.shape == shape and weights.dtype == dtype:
        return layout  # which torch.compile can trace, whatever its version
    return _read_layout(module)


@torch.compiler.assume_constant_result
def _read_layout(module: Experts) -> ExpertLayout:
    name = type(module).__name__
    if not module.has_gate:
        raise UnsupportedLayout(f"{name}: experts without a gate projection are not supported")
    if getattr(module, "has_post_expert_norm", False):  # newer than transformers 5.17
        raise UnsupportedLayout(f"{name}: a norm after each expert is not supported")
    gate_up = module.gate_up_proj
    if gate_up.dtype not in DTYPES:
        raise UnsupportedLayout(f"{name}: weights of {gate_up.dtype} are not supported")
    turned, interleaved = module.is_transposed, not module.is_concatenated
    layout = ExpertLayout.of_parameters(
        gate_up, module.has_bias, *_recognise_gate(module), turned, interleaved
    )
    module.__dict__["_spac_layout"] = gate_up.shape, gate_up.dtype, layout
    return layout


def stored_layout(module: Experts, config: SpacConfig) -> ExpertLayout:
    """How an attached model stores the experts of a module; ValueError if it cannot be so."""
    layout = expert_layout(module)
    if config.weights == "float":
        return layout
    return layout.quantized(config.weights, config.int4_group if config.weights == "int4" else 0)


def _recognise_gate(module: Experts) -> tuple[str, float, float]:
    constants: list[Any] = [getattr(module, name, None) for name in ("alpha", "limit")]
    clamped = all(isinstance(c, (int, float)) for c in constants)
    alpha, limit = map(float, constants) if clamped else (0.0, 0.0)
    # Pairs of which a clamp changes some, wherever it is; the large ones beside a 1, since their
    # products with the rounding of an activation that is nearly 0 would not be small.
    values = torch.linspace(-20, 20, 201, device="cpu", dtype=torch.float32)
    large = torch.tensor([-1e4, -1e3, -1e2, 1e2, 1e3, 1e4], device="cpu", dtype=torch.float32)
    ones = torch.ones_like(large)
    gate = torch.cat([values, large, ones])[None]
    up = torch.cat([values[torch.arange(201, device="cpu") * 77 % 201], ones, large])[None]
    pairs = torch.cat if module.is_concatenated else torch.stack
    with torch.no_grad():
        own = module._apply_gate(pairs([gate, up], dim=-1).flatten(1))
        for activation in ACTIVATIONS:
            if activation == "swiglu_clamp" and not clamped:
                continue
            layout = ExpertLayout(
                1, 1, 1, torch.float32, activation=activation, alpha=alpha, limit=limit
            )
            ours = reference.activate(gate, up, layout)
            if ours.shape == own.shape and torch.allclose(own, ours, rtol=1e-5, atol=1e-5):
                return activation, alpha, limit
    raise UnsupportedLayout(
        f"{type(module).__name__}: its gate is none of {', '.join(ACTIVATIONS)} "
        f"(activation {type(getattr(module, 'act_fn', None)).__name__})"
    )


def expert_parameters(module: Experts) -> dict[str, nn.Parameter]:
    """The weights of an experts module by spac's names; biases only where it has them."""
    names = list(WEIGHTS)[: 4 if module.has_bias else 2]
    return {name: getattr(module, WEIGHTS[name]) for name in names}


def stored_view(parameter: Tensor, name: str, layout: ExpertLayout) -> Tensor:
    """`parameter` seen row-major, as blobs hold it: [E, 2I, H], [E, H, I] or a bias."""
    if layout.transposed and not name.endswith("bias"):
        return parameter.transpose(1, 2)
    return parameter


def router_top_k(model: PreTrainedModel) -> int:
    """Experts that a token takes in each layer, from the model's config."""
    config = model.config.get_text_config()
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    raise UnsupportedLayout(
        f"{type(model).__name__}: its config does not say how many experts a token takes"
    )
