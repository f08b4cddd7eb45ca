"""The speculative loop: draft, verify in one target forward, accept, repeat. Batch 1."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spac import ops
from spac.attachment import Attachment, attachment
from spac.draft import Draft, ModelDraft, NgramDraft, NoDraft
from spac.draft_length import DraftLengthController
from spac.experts import find_experts
from spac.sampling import Seeded, Warp, make_warp
from spac.target import EagerTarget, NotCapturable, StaticTarget, Target, keeps_state, log

P = ParamSpec("P")
R = TypeVar("R")
_MAX_GAMMA = 16  # of "auto"
_MOST_DRAFTED = 64


@dataclass
class GenerationResult:
    """Tokens and counts of one `generate` call; seconds are wall time."""

    sequences: Tensor  # int64 [1, prompt + new]
    new_tokens: int = 0
    target_forwards: int = 0  # verify windows, without prefill
    drafted: int = 0
    accepted: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0  # without capture_seconds
    capture_seconds: float = 0.0  # spent on CUDA graphs, once for each width of a window
    gammas: list[int] = field(default_factory=list)  # draft length of every window
    draft_length_reason: str = ""

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were accepted; 0 if none was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_forward(self) -> float:
        """Tokens per target forward, the first one, which prefill gives, left out."""
        return (self.new_tokens - 1) / self.target_forwards if self.target_forwards else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decode speed: prefill and the token that it gives are left out."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


def _exclusive(function: Callable[P, R]) -> Callable[P, R]:
    """One generation at a time on an attached model, and no detach meanwhile."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        state = attachment(args[0] if args else kwargs["model"])  # type: ignore[arg-type]
        with nullcontext() if state is None else state.in_use("generate"):
            return function(*args, **kwargs)

    return guarded


@_exclusive
@torch.inference_mode(False)  # the next text uses its tensors again, perhaps outside of it
@torch.no_grad()
def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    draft: PreTrainedModel | str | None = None,
    num_draft_tokens: int | str = "auto",
    max_new_tokens: int = 128,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | list[int] | None = None,
    streamer: Any = None,
    seed: int | None = None,
    return_result: bool = False,
) -> Tensor | GenerationResult:
    """Generate up to `max_new_tokens` after input_ids int64 [1, n]; returns ids [1, n + new].

    model: a transformers causal LM, attached or not. draft: a causal LM with the same tokenizer,
    "ngram" (prompt lookup) or None. num_draft_tokens: draft length gamma >= 0, or "auto", which
    chooses it, 0 included, by predicted speed; for an attached model at most max_window - 1.
    Greedy output is the target's own greedy choice, whatever the draft; with `do_sample` its
    distribution is the target's (temperature, top_k, top_p; 0 and 1.0 switch the last two off).
    seed: the sampled text depends on it alone, the same for every draft and draft length
    (`spac.sampling.Seeded`, on one kind of device); without one, the standard rule accepts a little
    more, on torch's global random numbers. eos_token_id: default from the model's
    generation_config. streamer: a transformers streamer. With `return_result` the whole
    `GenerationResult` comes back; `spac.stats(model)` keeps it too for an attached model.
    Raises ValueError for a bad argument or a draft with another vocabulary, RuntimeError if the
    model is generating already, or its weights were changed while attached.
    """
    _check_ids(input_ids, model)
    check_options(num_draft_tokens, max_new_tokens, temperature, top_k, top_p)
    device = model.device
    warp: Warp | None = make_warp(temperature, top_k, top_p) if do_sample else None
    generator = None  # with one, acceptance is by the standard rule, else by the best score
    if warp is not None and seed is None:
        generator = torch.Generator(device).manual_seed(int(torch.randint(1 << 62, ())))
    elif warp is not None and seed is not None:
        warp = Seeded(warp, seed, device)
    state = attachment(model)
    engine = state.engine if state is not None else None
    length = input_ids.shape[1] + max_new_tokens
    drafter = _drafter(model, draft, warp, generator, state, length)
    most = _MOST_DRAFTED if engine is None else min(engine.config.max_window - 1, _MOST_DRAFTED)
    chooser = _GammaChooser(num_draft_tokens, 0 if isinstance(drafter, NoDraft) else most)
    eos = _eos_ids(model, eos_token_id)

    # On the host: between two windows, whatever a GPU need not be asked for is time won.
    text: list[int] = input_ids[0].tolist()
    result = GenerationResult(input_ids)
    target = _target(model, state, length)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    start = time.perf_counter()
    row = target.prefill(input_ids.to(device)[0])
    if bool(row.isnan().any()):
        raise ValueError(
            "generate: the model's logits are not numbers: its weights are damaged, or "
            f"{row.dtype} overflows"
        )
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    outcome, ids = _accept(target, row, nothing, None, warp, len(text), generator)
    done = _append(text, ids, result, max_new_tokens, eos, streamer)
    result.prefill_seconds = time.perf_counter() - start
    while not done:
        began = time.perf_counter()
        gamma = min(chooser.choose(), max_new_tokens - result.new_tokens - 1)
        if (
            engine is not None
            and isinstance(drafter, ModelDraft)
            and drafter.model is not model
            and result.target_forwards
        ):
            engine.drafts.begin(gamma)
            drafter.launched = engine.drafts.launched
        drafted, probs = drafter.propose(text, gamma)
        drafted = drafted.to(device)
        if probs is not None:
            probs = probs.to(device)
        window = _joined(outcome[1:], drafted)
        captured = target.prepare(window.numel())
        began += captured
        drafted_at = time.perf_counter()
        logits = target.verify(window)
        outcome, ids = _accept(target, logits, drafted, probs, warp, len(text), generator)
        if engine is not None:
            engine.settle(outcome[0])
        kept = len(ids) - 1
        target.finish(drafted.numel() - kept)
        drafter.accepted(kept)
        ended = time.perf_counter()
        result.target_forwards += 1
        result.drafted += drafted.numel()
        result.accepted += kept
        result.gammas.append(drafted.numel())
        chooser.observe(drafted.numel(), kept, ended - drafted_at, drafted_at - began)
        result.capture_seconds += captured
        done = _append(text, ids, result, max_new_tokens, eos, streamer)
        result.decode_seconds += ended - began
    if streamer is not None:
        streamer.end()
    new = torch.tensor([text[input_ids.shape[1] :]], device=device)
    result.sequences = torch.cat([input_ids.to(device), new], dim=1)
    result.draft_length_reason = chooser.reason
    if state is not None:
        state.last_generation = result
    return result if return_result else result.sequences


def _target(model: PreTrainedModel, state: Attachment | None, length: int) -> Target:
    """A forward over target or draft for a text of `length` tokens: static where the target's
    attachment asks for it and the model can run it, else eager."""
    engine = None if state is None else state.engine
    if state is None or engine is None:
        return EagerTarget(model)
    wanted, room = engine.config.static_windows, engine.config.max_length
    if wanted is False or (wanted is None and engine.device.type != "cuda"):
        return EagerTarget(model)
    try:
        for _, module in find_experts(model):
            if module._forward_hooks or module._forward_pre_hooks:
                raise NotCapturable("hooks on its experts would not see the windows of a graph")
            if (binding := module.__dict__.get("_spac_binding")) is not None:
                binding.check(module)  # nor would this
        if length + engine.config.max_window > room:
            raise NotCapturable(f"{length} tokens and a window are more than max_length={room}")
        if id(model) in state.targets and state.targets[id(model)].outdated:
            del state.targets[id(model)]
        if id(model) not in state.targets:
            own = engine if attachment(model) is state else None
            state.targets[id(model)] = StaticTarget(model, own, room, engine.config.fuse_windows)
        target = state.targets[id(model)]
        target.reset()
        return target
    except NotCapturable as reason:
        log.warning("spac: %s runs eagerly, no CUDA graphs: %s", type(model).__name__, reason)
        return EagerTarget(model)


def _accept(
    target: Target,
    logits: Tensor,
    drafted: Tensor,
    probs: Tensor | None,
    warp: Warp | None,
    length: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, list[int]]:
    """For the logits [W, V] of a window behind a text of `length` tokens: how many are accepted and
    the token after them, int64 [2], and the new ids on the host."""
    if warp is not None:
        logits = warp(length, logits)
    if generator is None:
        outcome = ops.accept_greedy(logits, drafted)
    else:
        uniform = torch.rand(drafted.numel() + 1, device=logits.device, generator=generator)
        outcome = ops.accept_sample(logits, drafted, probs, uniform)
    kept, following, *ids = target.read(_joined(outcome, drafted))
    return outcome, [*ids[:kept], following]


def _joined(first: Tensor, drafted: Tensor) -> Tensor:
    return torch.cat([first, drafted]) if drafted.numel() else first


def _append(
    text: list[int],
    ids: list[int],
    result: GenerationResult,
    max_new_tokens: int,
    eos: set[int],
    streamer: Any,
) -> bool:
    """Add `ids` up to the limit or the first end-of-sequence token; True when done."""
    ids = ids[: max_new_tokens - result.new_tokens]
    end = next((i for i, token in enumerate(ids) if token in eos), None)
    if end is not None:
        ids = ids[: end + 1]
    result.new_tokens += len(ids)
    if streamer is not None:
        for token in ids:
            streamer.put(torch.tensor([token]))
    text += ids
    return end is not None or result.new_tokens >= max_new_tokens


class _GammaChooser:
    """A fixed draft length, or the controller's; at most `most`."""

    def __init__(self, num_draft_tokens: int | str, most: int) -> None:
        self._auto = None
        self._fixed = 0
        if num_draft_tokens == "auto" and most:
            self._auto = DraftLengthController(max_gamma=min(_MAX_GAMMA, most))
        elif num_draft_tokens != "auto":
            self._fixed = min(int(num_draft_tokens), most)

    def choose(self) -> int:
        return self._fixed if self._auto is None else self._auto.choose()

    def observe(self, gamma: int, accepted: int, step_s: float, draft_s: float) -> None:
        if self._auto is not None:
            self._auto.observe(gamma, accepted, step_s, draft_s)

    @property
    def reason(self) -> str:
        return f"fixed at {self._fixed}" if self._auto is None else self._auto.reason


def _drafter(
    model: PreTrainedModel,
    draft: PreTrainedModel | str | None,
    warp: Warp | None,
    generator: torch.Generator | None,
    state: Attachment | None,
    length: int,
) -> Draft:
    if draft is None:
        return NoDraft()
    for each in (model, draft):
        if isinstance(each, nn.Module) and keeps_state(each):
            raise ValueError(
                f"draft: {type(each).__name__} has recurrent layers, which cannot forget rejected "
                "tokens; use draft=None"
            )
    if draft == "ngram":
        return NgramDraft()
    if not isinstance(draft, nn.Module):
        raise ValueError(f'draft: expected a causal LM, "ngram" or None, got {draft!r}')
    if model.device != draft.device:
        raise ValueError(
            f"draft: it is on {draft.device}, the target on {model.device}; "
            "pass it to spac.attach(..., draft=draft) or move it"
        )
    vocabulary = model.config.get_text_config().vocab_size
    forward = _target(draft, state, length) if draft is not model else None
    return ModelDraft(draft, vocabulary, warp, generator, forward)


def _eos_ids(model: PreTrainedModel, eos_token_id: int | list[int] | None) -> set[int]:
    if eos_token_id is None:
        config = getattr(model, "generation_config", None)
        eos_token_id = getattr(config, "eos_token_id", None)
    if eos_token_id is None:
        return set()
    return set(eos_token_id) if isinstance(eos_token_id, Iterable) else {eos_token_id}


def _check_ids(input_ids: Tensor, model: PreTrainedModel) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int32, torch.int64):
        kind = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids: expected an int64 tensor [1, n], got {kind}")
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids: expected [1, n] with n >= 1, got {list(input_ids.shape)}")
    low, high = (int(bound) for bound in input_ids.aminmax())
    vocabulary = model.config.get_text_config().vocab_size
    if low < 0 or high >= vocabulary:  # on a GPU, embedding them would end the process
        raise ValueError(f"input_ids: expected 0..{vocabulary - 1}, got {low}..{high}")


def check_options(
    num_draft_tokens: int | str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> None:
    """ValueError for what `generate` cannot take, which needs no model to say so."""
    if num_draft_tokens != "auto" and (
        not isinstance(num_draft_tokens, int) or not 0 <= num_draft_tokens <= _MOST_DRAFTED
    ):
        raise ValueError(
            f'num_draft_tokens: expected 0..{_MOST_DRAFTED} or "auto", got {num_draft_tokens!r}'
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: must be at least 1, got {max_new_tokens}")
    if not temperature > 0:
        raise ValueError(f"temperature: must be positive, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k: must not be negative, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected more than 0 and at most 1, got {top_p}")
