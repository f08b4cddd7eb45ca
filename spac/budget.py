"""One number of GPU bytes, shared out: dense weights, draft, KV cache, workspace, then slots."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from spac.config import SpacConfig, format_bytes
from spac.experts import expert_parameters, find_experts, router_top_k, stored_layout
from spac.prefill import PREFILL_CHUNK, area_experts


@dataclass(frozen=True)
class Budget:
    """Bytes by purpose; `slots` is a number of experts."""

    total: int
    dense: int
    draft: int
    kv_cache: int
    workspace: int
    slots: int
    slot_bytes: int

    @property
    def fixed(self) -> int:
        return self.dense + self.draft + self.kv_cache + self.workspace


class BudgetTooSmall(ValueError):
    """The granted GPU bytes do not hold what must be there."""


def parameter_bytes(module: nn.Module, leave_out: set[int] | None = None) -> int:
    """Bytes of the distinct parameters and buffers, without those whose id is in `leave_out`."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.nbytes for key, t in tensors.items() if key not in (leave_out or set()))


def kv_cache_bytes(config, length: int, itemsize: int) -> int:
    """Bytes of a KV cache of `length` tokens for a transformers config, batch 1."""
    config = config.get_text_config()
    layers = list(config.per_layer_config)  # the heads of some models differ between layers
    return int(sum(_kv_numbers(layer) for layer in layers) * length * itemsize)


def _kv_numbers(config) -> float:
    """Numbers that a layer's attention keeps of a token."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):
        # Decompressed, where keys and values differ. Newer transformers keep less of some models
        # (the latents, PR 47761): rather too much is taken off here than too little.
        size = (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim) / 2
    return 2 * heads * size


def plan_budget(
    model: PreTrainedModel,
    total: int | None,
    settings: SpacConfig,
    draft: PreTrainedModel | None = None,
) -> Budget:
    """Share out `total` bytes; None means that every expert gets a slot.

    Raises BudgetTooSmall, naming what is needed and by what.
    """
    experts = [module for _, module in find_experts(model)]
    layouts = [stored_layout(module, settings) for module in experts]
    top_k = router_top_k(model)
    expert_ids = {id(p) for module in experts for p in expert_parameters(module).values()}
    config = model.config.get_text_config()
    itemsize = layouts[0].dtype.itemsize
    length = min(settings.max_length, getattr(config, "max_position_embeddings", None) or 1 << 30)
    dense = parameter_bytes(model, expert_ids)
    kv_cache = kv_cache_bytes(config, length, itemsize)
    draft_bytes = 0
    if draft is not None:
        draft_bytes = parameter_bytes(draft) + kv_cache_bytes(draft.config, length, itemsize)
    # A chunk of hidden rows and expert activations, the logits of one verify window in fp32, the
    # areas that missing experts of a prompt pass through.
    tokens = min(PREFILL_CHUNK, length)
    per_token = 8 * config.hidden_size + 3 * top_k * layouts[0].intermediate
    logits = 2 * 4 * settings.max_window * config.vocab_size
    slot_bytes = max(layout.blob_bytes for layout in layouts)
    areas = 2 * area_experts(layouts[0]) * slot_bytes
    workspace = 4 * tokens * per_token + logits + areas
    num_experts = sum(layout.num_experts for layout in layouts)
    fixed = dense + draft_bytes + kv_cache + workspace
    if total is None:
        total = fixed + num_experts * slot_bytes
    if total < fixed + slot_bytes:
        parts = {"dense weights": dense, "draft": draft_bytes, "KV cache": kv_cache}
        parts |= {"workspace": workspace, "one expert": slot_bytes}
        listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
        raise BudgetTooSmall(
            f"gpu_budget: {format_bytes(total)} given, {format_bytes(fixed + slot_bytes)} needed "
            f"({listed}; KV cache for max_length={length})"
        )
    slots = min((total - fixed) // slot_bytes, num_experts)
    return Budget(total, dense, draft_bytes, kv_cache, workspace, slots, slot_bytes)


def bytes_for_ratio(
    model: PreTrainedModel, ratio: float, settings: SpacConfig, draft: PreTrainedModel | None = None
) -> int:
    """The budget with which a share `ratio` (0 to 1) of all experts has a slot, at least one."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"cache ratio: expected 0 to 1, got {ratio}")
    everything = plan_budget(model, None, settings, draft)
    return everything.fixed + max(round(ratio * everything.slots), 1) * everything.slot_bytes
