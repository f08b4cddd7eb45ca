"""Record the routing of a running model as a `spac.trace.Trace`."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from spac.experts import expert_layout, find_experts
from spac.trace import Trace


class Recorder:
    """Context manager that keeps the expert ids of every token that passes the model's experts.

    with Recorder(model) as recorder:
        result = spac.generate(model, ids, return_result=True)
    trace = recorder.trace()

    Works on attached and plain models; batch 1. Ids outside 0..E-1 cannot be recorded.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.experts = [module for _, module in find_experts(model)]
        if not self.experts:
            raise ValueError(f"record: {type(model).__name__} has no Mixture-of-Experts layers")
        self.model_name = type(model).__name__
        self._ids: list[list[np.ndarray]] = [[] for _ in self.experts]
        self._hooks: list[Any] = []

    def __enter__(self) -> Recorder:
        for ids, module in zip(self._ids, self.experts, strict=True):

            def keep(_module: nn.Module, args: tuple[Any, ...], ids: list = ids) -> None:
                ids.append(args[1].detach().cpu().numpy())

            self._hooks.append(module.register_forward_pre_hook(keep))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def trace(self) -> Trace:
        """What was recorded; every forward of the model is one window."""
        if not self._ids[0]:
            raise ValueError("record: the model ran no forward while it was recorded")
        num_experts = expert_layout(self.experts[0]).num_experts
        ids = np.stack([np.concatenate(layer) for layer in self._ids], axis=1)
        sizes = [len(window) for window in self._ids[0]]
        return Trace(
            expert_ids=ids.astype(np.uint8 if num_experts <= 256 else np.int16),
            num_experts=num_experts,
            boundaries=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            model=self.model_name,
        )
