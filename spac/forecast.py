"""Predicts speed from a model's config, a machine and a budget, for `python -m spac plan`.

No weights and no trace are needed, so the routing is assumed; the constants are fitted to the five
development traces (docs/method.md):

    distinct experts of a window of W tokens   D = min(E, k W^0.65)
    share of the pairs that are resident       c = r^0.22             r = slots / all experts
    share of the distinct experts resident     d = r^(0.22 + 0.062 ln W)

D, c and d go into the cost model, one layer at a time; the drafts into the draft length's formula.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spac.budget import Budget, parameter_bytes, plan_budget
from spac.config import SpacConfig
from spac.cost import CostModel, measure
from spac.draft_length import expected_tokens
from spac.experts import expert_layout, find_experts, router_top_k
from spac.machine import Machine
from spac.prefill import PREFILL_CHUNK, area_experts

REUSE, PAIRS, SPREAD = 0.65, 0.22, 0.062
CALIBRATION_S = 15.0  # at most so long the operators of this machine are timed


@dataclass(frozen=True)
class Step:
    """Seconds of one verify step and what they are made of; gpu and missing run side by side."""

    gamma: int
    draft: float
    dense: float
    handoff: float
    gpu: float  # resident experts
    missing: float  # the others, shared by CPU and link
    tokens: float  # expected

    @property
    def seconds(self) -> float:
        return self.draft + self.dense + self.handoff + max(self.gpu, self.missing)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Forecast:
    """One budget: what fits, the best draft length, the seconds to the first token."""

    budget: Budget
    share: float  # of the experts that have a slot
    coverage: float  # share of the pairs, at the best gamma
    best: Step
    without: Step  # gamma 0
    ttft: float


def config_model(path: str) -> Any:
    """A model of this checkpoint's config, without weights (on the meta device); bf16 if the config
    does not name a dtype."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from spac.loading import check_config, is_local

    if is_local(path) and Path(path).is_dir():
        check_config(path)
    try:
        config = AutoConfig.from_pretrained(path)
        dtype = getattr(config.get_text_config(), "dtype", None) or torch.bfloat16
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # config classes raise anything
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path}: cannot read the model's config: {lines[0]}") from None


def calibrated(model: Any) -> CostModel:
    """Costs of this machine for the experts of `model`, in under 30 s.

    The dense part is not timed: it reads its weights as fast as the expert FFN reads its own.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = expert_layout(find_experts(model)[0][1])
    costs = measure(layout, device, limit_s=CALIBRATION_S, name="this machine")
    layers = len(find_experts(model))
    dense = step_bytes(model) / layers * costs.gpu_expert / costs.expert_bytes
    return CostModel(**{**vars(costs), "dense_layer": dense + costs.gpu_launch})


def machine_costs(model: Any, machine: Machine) -> CostModel:
    """Costs of a profile for the experts of `model`; its dense part takes at least its bytes."""
    layout = expert_layout(find_experts(model)[0][1])
    costs = machine.cost(layout.blob_bytes, 6.0 * layout.hidden * layout.intermediate)
    read = step_bytes(model) / len(find_experts(model)) / machine.gpu_bandwidth
    return CostModel(**{**vars(costs), "dense_layer": max(costs.dense_layer, read)})


def forecast(
    model: Any,
    total: int | None,
    costs: CostModel,
    *,
    draft: Any = None,
    draft_token: float = 0.0,
    acceptance: float = 0.0,
    max_gamma: int = 8,
    prompt: int = 512,
    settings: SpacConfig | None = None,
) -> Forecast:
    """Speed of `model` (weights are not read) with `total` GPU bytes; see the module text.

    draft: a draft model that shares the budget; draft_token: seconds per drafted token;
    acceptance: chance that a drafted token is kept, 0 for no draft at all. Raises BudgetTooSmall.
    """
    budget = plan_budget(model, total, settings or SpacConfig(), draft)
    modules = find_experts(model)
    layers, layout = len(modules), expert_layout(modules[0][1])
    experts = layout.num_experts
    k, share = router_top_k(model), budget.slots / (layers * experts)

    def step(gamma: int) -> Step:
        width = gamma + 1
        distinct = min(experts, k * width**REUSE)
        pairs, covered = width * k, share**PAIRS
        here = distinct * share ** (PAIRS + SPREAD * math.log(width))
        return Step(
            gamma,
            draft_token * gamma,
            layers * float(costs.dense(width)),
            layers * costs.handoff * (share < 1),
            layers * float(costs.gpu(here, pairs * covered)),
            layers * costs.missing(distinct - here, pairs * (1 - covered)),
            expected_tokens(acceptance, gamma),
        )

    steps = [step(gamma) for gamma in range(max_gamma + 1 if acceptance else 1)]
    best = max(steps, key=lambda s: s.tokens_per_second)

    def prefill(tokens: int) -> float:
        used = min(experts, k * tokens**REUSE)
        missing = used * (1 - share)
        if area_experts(layout):  # else a prompt reads them over the link alone
            read = costs.missing(missing, tokens * k * (1 - share))
        else:
            read = float(costs.stream(missing))
        ffn = max(float(costs.gpu(used, tokens * k)), read)
        return layers * (ffn + float(costs.dense(tokens)))

    chunks, rest = divmod(prompt, PREFILL_CHUNK)  # each reads its experts anew
    ttft = chunks * prefill(PREFILL_CHUNK) + (prefill(rest) if rest else 0.0)
    return Forecast(budget, share, share**PAIRS, best, steps[0], ttft)


def step_bytes(model: Any) -> int:
    """Bytes that every step reads: all but the experts and, where it is not the head as well, the
    table of the embeddings."""
    ids = {id(p) for _, module in find_experts(model) for p in module.parameters()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is not table.weight:
        ids.add(id(table.weight))
    return parameter_bytes(model, ids)
