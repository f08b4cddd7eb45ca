"""transformers backend: importing this module registers `experts_implementation="spac"`.

An attached model (spac.attach) runs its experts through its engine; any other model runs them on
the parameters where they lie, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.integrations.moe import ExpertsInterface

from spac import ops
from spac.experts import expert_layout, expert_parameters


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts of one layer: hidden_states [S, H], top_k_index and top_k_weights [S, k].

    Ids of -1, `num_experts` (the expert-parallel sentinel) and beyond add nothing.
    """
    binding = self.__dict__.get("_spac_binding")
    if binding is not None:
        if is_parametrized(self):  # peft wraps weights so for as long as a forward
            raise RuntimeError(
                "spac: an attached model does not apply adapters to the weights of its experts; "
                "merge them before spac.attach"
            )
        if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
            raise RuntimeError(
                "spac: an attached model has no gradients; use torch.no_grad(), or train after "
                'spac.detach(model) with experts_implementation="spac"'
            )
        return _attached(self, binding, hidden_states, top_k_index, top_k_weights)
    layout, weights = expert_layout(self), expert_parameters(self)
    return ops.expert_ffn(
        hidden_states,
        top_k_index,
        top_k_weights,
        weights["gate_up"],
        weights["down"],
        weights.get("gate_up_bias"),
        weights.get("down_bias"),
        activation=layout.activation,
        alpha=layout.alpha,
        limit=layout.limit,
        transposed=layout.transposed,
        interleaved=layout.interleaved,
    )


@torch.compiler.disable(reason="spac: the engine of an attached model runs outside of graphs")
def _attached(
    module: nn.Module, binding: Any, hidden: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    binding.check(module)
    return binding.engine.forward(binding.layer, hidden, ids, weights)


ExpertsInterface.register("spac", experts_forward)
