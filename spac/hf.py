"""transformers backend: importing this module registers `experts_implementation="spac"`.

An attached model (spac.attach) runs its experts through its engine; any other model runs them on
the parameters where they lie, forward and backward.
"""

from __future__ import annotations

from torch import Tensor, nn
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
        binding.check(self)
        return binding.engine.forward(binding.layer, hidden_states, top_k_index, top_k_weights)
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


ExpertsInterface.register("spac", experts_forward)
