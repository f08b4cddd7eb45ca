"""Decoder layers of known models in few launches, for windows of up to 16 tokens.

A transformers layer runs about forty kernels at that size, most of which last no longer than their
launch. Here they are eight and the experts' own (kernels/fused_linear.py, window_attention.py,
route.py), and on Hopper each starts before the one in front has ended (pdl.py). Intermediate
results are rounded where the eager layer rounds them; only the order of sums differs. The model
itself is never changed: `few_launches` replaces the layers' forward as long as it lasts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

MOST_TOKENS = 16
_LAYERS = ("LlamaDecoderLayer", "MixtralDecoderLayer", "Qwen3DecoderLayer", "Qwen3MoeDecoderLayer")
_ROUNDED = "Qwen3MoeTopKRouter"  # its weights have the dtype of its logits; Mixtral's are fp32
_ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu"}


def can_run(model: PreTrainedModel) -> bool:
    """Whether `few_launches` knows every decoder layer of `model` and the norm behind them."""
    layers = decoder_layers(model)
    if getattr(model.config.get_text_config(), "sliding_window", None):
        return False
    norm = getattr(model.base_model, "norm", None)
    if not type(norm).__name__.endswith("RMSNorm") or _changed(norm):
        return False
    return bool(layers) and all(_known(layer) for layer in layers)


@contextmanager
def few_launches(model: PreTrainedModel) -> Iterator[None]:
    """Forwards of `model` meanwhile: one text, up to MOST_TOKENS tokens, a StaticCache, a GPU.

    They leave the lengths of the cache's layers to the caller. Only for models that `can_run`.
    """
    layers = decoder_layers(model)
    norm: Any = model.base_model.norm
    pending: list[tuple[Tensor, bool]] = []
    try:
        for layer in layers:
            layer.__dict__["forward"] = functools.partial(_forward, layer, pending)
        norm.__dict__["forward"] = functools.partial(_norm, norm, pending)
        yield
    finally:
        for module in (*layers, norm):
            module.__dict__.pop("forward", None)


def decoder_layers(model: PreTrainedModel) -> list[Any]:
    """The modules of a model's layers, in order; none where they are not called so."""
    return list(getattr(model.base_model, "layers", []))


def _known(layer: Any) -> bool:
    if type(layer).__name__ not in _LAYERS or "forward" in vars(layer):
        return False
    mlp = layer.mlp
    experts = getattr(mlp, "experts", None)
    own = [
        m for m in layer.modules() if m is not experts
    ]  # attach has its own rule for hooks there
    if any(_changed(m) for m in own):
        return False
    linears = [m for name, m in layer.named_modules() if name.endswith("_proj")]
    if any(type(m) is not nn.Linear or m.bias is not None for m in linears):
        return False
    return experts is not None or type(mlp.act_fn).__name__ in _ACTIVATIONS


def _changed(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _norm(module: Any, pending: list[tuple[Tensor, bool]], hidden_states: Tensor) -> Tensor:
    """The norm behind the last layer."""
    return _add_norm(module, pending, hidden_states[0])[1][None]


def _add_norm(
    module: Any, pending: list[tuple[Tensor, bool]], hidden: Tensor
) -> tuple[Tensor, Tensor]:
    from spac.kernels.fused_linear import add_norm

    before, chained = pending.pop() if pending else (None, False)
    return add_norm(hidden, before, module.weight, module.variance_epsilon, chained)


def _forward(
    layer: Any,
    pending: list[tuple[Tensor, bool]],
    hidden_states: Tensor,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    past_key_values: Any,
    **_: Any,
) -> Tensor:
    """A layer leaves the sum behind its MLP to the next one's norm, which finds it in `pending`.

    With it: whether that norm may start early (kernels/pdl.py), so not behind experts, whose
    kernels may wait for the CPU or for a copy, nor behind what is not ours.
    """
    from spac.kernels.fused_linear import add_norm, fused_gated, fused_linear

    attention, mlp = layer.self_attn, layer.mlp
    hidden, x = _add_norm(layer.input_layernorm, pending, hidden_states[0])
    heads = _attention(attention, x, position_embeddings, past_key_values)
    after = fused_linear(heads, [attention.o_proj.weight])
    norm = layer.post_attention_layernorm
    hidden, x = add_norm(hidden, after, norm.weight, norm.variance_epsilon)
    if hasattr(mlp, "experts"):
        rest = _experts(mlp, x)[None]
    else:
        activation = _ACTIVATIONS[type(mlp.act_fn).__name__]
        h = fused_gated(x, mlp.gate_proj.weight, mlp.up_proj.weight, activation)
        rest = fused_linear(h, [mlp.down_proj.weight])
    pending.append((rest, not hasattr(mlp, "experts")))
    return hidden[None]


def _attention(
    attention: Any, x: Tensor, rotary: tuple[Tensor, Tensor], past_key_values: Any
) -> Tensor:
    from spac.kernels.fused_linear import fused_linear
    from spac.kernels.window_attention import window_attention

    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    qkv = fused_linear(x, [p.weight for p in projections])
    cache, D = past_key_values.layers[attention.layer_idx], attention.head_dim
    if not cache.is_initialized:
        kv = qkv[0, :, -2 * attention.v_proj.out_features :].unflatten(1, (2, -1, D))
        key, value = kv.permute(1, 2, 0, 3)[:, None].to(x.dtype)
        cache.lazy_initialization(key, value)  # for their shapes
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return window_attention(
        qkv,
        rotary[0][0],
        rotary[1][0],
        None if q_norm is None else q_norm.weight,
        None if k_norm is None else k_norm.weight,
        0.0 if q_norm is None else q_norm.variance_epsilon,
        cache.keys[0],
        cache.values[0],
        cache.cumulative_length,
        attention.scaling,
    )


def _experts(mlp: Any, x: Tensor) -> Tensor:
    from spac.kernels.fused_linear import fused_linear
    from spac.kernels.route import route

    gate = mlp.gate
    logits = fused_linear(x, [gate.weight])
    rounded = type(gate).__name__ == _ROUNDED
    normalize = getattr(gate, "norm_topk_prob", True)
    weights, ids = route(logits, gate.top_k, normalize, x.dtype, rounded)
    out: Tensor = mlp.experts(x, ids, weights)
    return out
