"""Shapes and rates of the demo models, and their configurations."""

import math
from dataclasses import dataclass

import torch
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the models, beside the data, the seed and the time."""

    vocab: int = 2048
    layers: int = 6
    experts: int = 32
    top_k: int = 4
    hidden: int = 128
    intermediate: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    draft_layers: int = 2
    draft_intermediate: int = 192
    context: int = 1024
    batch: int = 32
    learning_rate: float = 3e-3
    draft_learning_rate: float = 3e-3
    weight_decay: float = 0.1
    dropout: float = 0.1  # target, while training: attention weights, embeddings, block outputs
    balance: float = 0.01  # coefficient of the load-balancing loss
    warm_up: float = 0.03  # share of the time
    final_rate: float = 0.03  # last learning rate as a share of the peak
    aligned: float = 0.1  # share of the crops that begin at a document's BOS
    least: int = 1  # steps of a stage, even when its time is up
    checks: int = 25  # measurements on the validation modules, evenly over the time
    base_share: float = 0.35  # of the draft's time, before it learns from the target's own text
    rounds: int = 9  # times that the target writes text for the draft
    round_size: int = 3072  # texts a round
    new_tokens: int = 128  # tokens a text
    gamma: int = 4
    files: int | None = None  # training files, all if None
    evaluated: int | None = None  # tokens of the loss measurements, all if None


SMOKE = Recipe(
    vocab=512, layers=2, experts=8, top_k=2, hidden=64, intermediate=32, heads=2, kv_heads=1,
    draft_layers=1, draft_intermediate=64, context=128, batch=8, least=10, checks=3, rounds=2,
    round_size=16, new_tokens=24, files=40, evaluated=4096,
)  # fmt: skip


def target_config(recipe: Recipe, bos: int, eos: int) -> PretrainedConfig:
    return Qwen3MoeConfig(
        **_shared(recipe, bos, eos),
        num_hidden_layers=recipe.layers,
        intermediate_size=recipe.intermediate * recipe.top_k,
        moe_intermediate_size=recipe.intermediate,
        num_experts=recipe.experts,
        num_experts_per_tok=recipe.top_k,
        norm_topk_prob=True,
        router_aux_loss_coef=recipe.balance,
    )


def draft_config(recipe: Recipe, bos: int, eos: int) -> PretrainedConfig:
    return Qwen3Config(
        **_shared(recipe, bos, eos),
        num_hidden_layers=recipe.draft_layers,
        intermediate_size=recipe.draft_intermediate,
    )


def _shared(recipe: Recipe, bos: int, eos: int) -> dict:
    return {
        "vocab_size": recipe.vocab,
        "hidden_size": recipe.hidden,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.kv_heads,
        "head_dim": recipe.head_dim,
        "max_position_embeddings": recipe.context,
        "initializer_range": 0.5 / math.sqrt(recipe.hidden),
        "tie_word_embeddings": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": eos,
    }


def build(config: PretrainedConfig, experts: str | None = None) -> PreTrainedModel:
    """A model with fresh fp32 weights; `experts` names the experts backend of an MoE."""
    if experts == "spac":
        import spac.hf  # noqa: F401  registers the backend
    options = {"experts_implementation": experts} if experts else {}
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
