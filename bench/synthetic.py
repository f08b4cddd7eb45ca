"""Full-size models with random weights, whose routing is replayed from a real trace.

Shapes, bytes, routing locality and timing are real; the text is not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

import spac.hf  # noqa: F401  (registers the backend)
from spac.config import format_bytes
from spac.experts import expert_layout, find_experts
from spac.layout import ExpertLayout
from spac.progress import progress
from spac.quantize import quantize
from spac.replay import Window, WindowSource
from spac.store import HostStore, blob_views
from spac.target import StaticTarget
from spac.trace import Trace

# Fields of transformers configs; experts and top-k come from the trace.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "small": {
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
    },
}
# (layers, hidden, intermediate, heads, key-value heads) of Qwen3-0.6B, Qwen3-4B and a test draft.
DRAFTS = {
    "0.6b": (28, 1024, 3072, 16, 8),
    "4b": (36, 2560, 9728, 32, 8),
    "small": (2, 32, 64, 2, 2),
}
_STD = 0.02


@dataclass
class Synthetic:
    """A model on `device` whose experts lie in `store` alone."""

    model: PreTrainedModel
    store: HostStore
    device: torch.device
    seconds: float  # of making it


def build(
    shape: str, trace: Trace, layers: int | None, device: torch.device, form: str = "float"
) -> Synthetic:
    """Random weights in bf16, made on `device`; experts go straight into the host store.

    `layers` decoder layers (default: as many as the trace has); `form` of the experts' weights as
    `spac.quantize` has them. Raises ValueError if the experts do not fit the free host memory.
    """
    start = time.perf_counter()
    config = Qwen3MoeConfig(
        **SHAPES[shape],
        num_hidden_layers=layers or trace.shape[1],
        num_experts=trace.num_experts,
        num_experts_per_tok=trace.shape[2],
        norm_topk_prob=True,
        max_position_embeddings=40960,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    experts = [module for _, module in find_experts(model)]
    layouts = [expert_layout(module) for module in experts]
    if form != "float":
        layouts = [layout.quantized(form) for layout in layouts]
    _check_memory(sum(layout.num_experts * layout.blob_bytes for layout in layouts))
    skip = {id(p) for module in experts for p in module.parameters()}
    _materialise(model, device, skip)
    store = HostStore(layouts, pin=device.type == "cuda")
    shown = sum(layout.num_experts * layout.blob_bytes for layout in layouts) > 1 << 30
    for layout in progress(layouts, "random experts into the host store", show=shown):
        _fill(store.allocate(), layout, device)
    model.set_experts_implementation("spac")
    return Synthetic(model, store, device, time.perf_counter() - start)


def _fill(blobs: Tensor, layout: ExpertLayout, device: torch.device) -> None:
    if layout.form != "float":
        return _fill_quantized(blobs, layout, device)
    flat = blobs.view(layout.dtype)
    weights = torch.empty(flat.shape[1], dtype=layout.dtype, device=device)
    for blob in flat:  # one expert at a time: the Python heap holds none of it
        blob.copy_(weights.normal_(0, _STD), non_blocking=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fill_quantized(blobs: Tensor, layout: ExpertLayout, device: torch.device) -> None:
    """Eight different experts, again and again."""
    H, inter = layout.hidden, layout.intermediate
    views = blob_views(blobs, layout)
    for first in range(min(8, layout.num_experts)):
        gate_up = torch.randn(2 * inter, H, device=device) * _STD
        down = torch.randn(H, inter, device=device) * _STD
        for name, section in quantize({"gate_up": gate_up, "down": down}, layout).items():
            views[name][first::8] = section.cpu()


def _materialise(model: PreTrainedModel, device: torch.device, skip: set[int]) -> None:
    """Give the parameters of a model on "meta" random values on `device`."""
    for name, parameter in list(model.named_parameters()):
        if id(parameter) in skip:
            continue
        owner, _, leaf = name.rpartition(".")
        value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        value.normal_(0, _STD) if parameter.dim() > 1 else value.fill_(1)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config).to(device)


def _check_memory(nbytes: int) -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    if nbytes > 0.95 * free:
        raise ValueError(
            f"--layers: {format_bytes(nbytes)} of experts do not fit the "
            f"{format_bytes(free)} of free host memory; take fewer"
        )


class Draft(Protocol):
    """Proposes tokens; here only its time matters. launched() is called when the first step is."""

    def run(self, gamma: int, launched: Callable[[], None] = lambda: None) -> None: ...


class NoDraftCost:
    """Drafted tokens cost nothing (prompt lookup)."""

    def run(self, gamma: int, launched: Callable[[], None] = lambda: None) -> None:
        pass


class DenseDraft:
    """A dense Qwen3 of random weights; a greedy step is a CUDA graph where that works."""

    def __init__(self, shape: str, vocab: int, device: torch.device, length: int) -> None:
        layers, hidden, inter, heads, kv = DRAFTS[shape]
        config = Qwen3Config(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=inter,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            head_dim=128 if hidden > 64 else 16,
            tie_word_embeddings=True,
        )
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        self.model.lm_head.weight = self.model.model.embed_tokens.weight
        _materialise(self.model, device, set())
        self.model.lm_head.weight = self.model.model.embed_tokens.weight
        self.target = StaticTarget(self.model, None, length)
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        self.run(1)

    @property
    def how(self) -> str:
        """Whether its steps are CUDA graphs."""
        if self.target.captured:
            return "in a CUDA graph"
        return f"eager ({', '.join(self.target.reasons) or 'no CUDA graphs on a CPU'})"

    def run(self, gamma: int, launched: Callable[[], None] = lambda: None) -> None:
        """`gamma` greedy steps; the cache keeps the length that it had."""
        for i in range(gamma):
            self.token.copy_(self.target.verify(self.token).argmax(-1))
            if i == 0:
                launched()
        self.target.finish(gamma)


def make_draft(name: str | None, made: Synthetic, length: int) -> Draft:
    """The dense draft called `name`; None or "none": one that costs nothing."""
    if name in (None, "none"):
        return NoDraftCost()
    return DenseDraft(str(name), made.model.config.vocab_size, made.device, length)


class ReplayedRouting:
    """Stands between the model and who runs its experts: replaces the router's choice."""

    def __init__(self, trace: Trace, layers: int, device: torch.device) -> None:
        self.trace, self.device = trace, device
        self.layers = [layer % trace.shape[1] for layer in range(layers)]
        self.ids = torch.empty(0)  # int32 [L, T, k] of the forward to come
        self.provider: Any = None

    def window(self, rows: np.ndarray) -> Tensor:
        """ids [W, layers of the trace, k] as `ids` wants them, on the device."""
        mapped = rows[:, self.layers].astype(np.int32).transpose(1, 0, 2)
        return torch.from_numpy(np.ascontiguousarray(mapped)).to(self.device)

    def forward(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.provider.forward(layer, hidden, self.ids[layer], weights)


def tiled(trace: Trace, tokens: int, shift: int) -> Trace:
    """At least `tokens` tokens: the trace again and again, expert ids moved on by `shift`."""
    repeats = math.ceil(tokens / trace.shape[0])
    ids = trace.expert_ids.astype(np.int32)
    parts = [(ids + r * shift % trace.num_experts) % trace.num_experts for r in range(repeats)]
    return Trace(np.concatenate(parts).astype(np.int16), trace.num_experts, model=trace.model)


@dataclass(frozen=True)
class Text:
    """What a full-size run decodes: a prompt, and after it `warmup` + `tokens` tokens in windows
    of every draft length of `gammas`, and PROFILED windows more."""

    gammas: tuple[int, ...]
    tokens: int
    warmup: int
    prompt_tokens: int
    acceptance: float  # chance of each drafted token
    shift: int  # of expert ids when the trace repeats
    seed: int

    PROFILED = 3

    @property
    def spare(self) -> int:
        return self.PROFILED * (max(self.gammas) + 1)

    def make(self, trace: Trace) -> tuple[Trace, Trace, dict[int, list[Window]]]:
        """The prompt, with rows of the trace's first quarter; the text after it; its windows."""
        quarter = trace.shape[0] // 4
        needed = quarter + self.warmup + self.tokens + 8 * (max(self.gammas) + 1)
        begun, text = tiled(trace, needed, self.shift).split(max(quarter, 1))
        rng = np.random.default_rng(self.seed)
        rows = begun.expert_ids[rng.integers(0, begun.shape[0], self.prompt_tokens)]
        windows = {
            gamma: cut(
                text, self.warmup + self.tokens, gamma, self.PROFILED, self.acceptance, self.seed
            )
            for gamma in self.gammas
        }
        return Trace(rows, trace.num_experts, model=trace.model), text, windows


def cut(
    trace: Trace, tokens: int, gamma: int, more: int, acceptance: float, seed: int
) -> list[Window]:
    """Windows of gamma + 1 rows over the first `tokens` tokens of text, and `more` after them."""
    source = WindowSource(trace, acceptance, "next", seed)
    windows, made = [], 0
    while (made < tokens or more) and (window := source.draw(gamma)) is not None:
        more -= made >= tokens
        windows.append(window)
        made += window.accepted + 1
    return windows
