"""Who proposes tokens: a small causal LM, or the text itself (prompt lookup)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spac.sampling import Warp
from spac.target import EagerTarget, Target


class Draft(Protocol):
    """Proposes up to `gamma` tokens that may follow `tokens` [n] (int64, on the draft's device)."""

    def propose(self, tokens: Tensor, gamma: int) -> tuple[Tensor, Tensor | None]:
        """Drafted ids int64 [g <= gamma] and their distributions fp32 [g, V], None if one-hot."""
        ...


class ModelDraft:
    """A causal LM with the target's vocabulary: the best token by `warp`, or one that `generator`
    draws from it."""

    def __init__(
        self,
        model: PreTrainedModel,
        vocab_size: int,
        warp: Warp | None = None,
        generator: torch.Generator | None = None,
        target: Target | None = None,
    ) -> None:
        """target: the forward over `model`, with an empty cache; default eager."""
        found = model.config.get_text_config().vocab_size
        if found != vocab_size:
            raise ValueError(
                f"draft: its vocabulary has {found} tokens, the target's {vocab_size}; "
                "a draft must share the target's tokenizer"
            )
        self.model, self.warp, self.generator = model, warp, generator
        self.target = EagerTarget(model) if target is None else target
        for width in (1, 2):  # what `propose` feeds
            self.target.prepare(width)
        self._seen = torch.empty(0, dtype=torch.int64)  # the tokens that the cache holds
        self.launched: Callable[[], None] = _nothing  # hears of the first step

    def propose(self, tokens: Tensor, gamma: int) -> tuple[Tensor, Tensor | None]:
        device = self.model.device
        tokens = tokens.to(device)
        self._forget_rejected(tokens)
        drafted: list[Tensor] = []
        probs: list[Tensor] = []
        new = tokens[self._seen.numel() :]
        for _ in range(gamma):
            # Two: after a window that was accepted whole, its last token is new here as well.
            feed = self.target.verify if new.numel() <= 2 else self.target.prefill
            logits = feed(new)[-1:]
            if not drafted:
                self.launched()
            self._seen = torch.cat([self._seen.to(device), new])
            if self.warp is not None:
                logits = self.warp(self._seen[None], logits)
            if self.generator is None:
                new = logits.argmax(-1)
            else:
                p = torch.softmax(logits.float(), dim=-1)
                new = torch.multinomial(p[0], 1, generator=self.generator)
                probs.append(p)
            drafted.append(new)
        if not drafted:
            return torch.empty(0, dtype=torch.int64, device=device), None
        return torch.cat(drafted), torch.cat(probs) if probs else None

    def _forget_rejected(self, tokens: Tensor) -> None:
        """Keep the cache entries that agree with `tokens`; leave at least one token to feed."""
        n = min(self._seen.numel(), tokens.numel() - 1)
        same = (self._seen[:n].to(tokens.device) == tokens[:n]).to(torch.int64)
        keep = int(same.cumprod(0).sum())
        if keep < self._seen.numel():
            self.target.finish(self._seen.numel() - keep)
            self._seen = self._seen[:keep]


def _nothing() -> None:
    pass


class NgramDraft:
    """Prompt lookup: what followed the latest earlier occurrence of the last n tokens.

    Longest suffix first, n = 4..1 (Saxena 2023, "Prompt Lookup Decoding").
    """

    def __init__(self, longest: int = 4) -> None:
        self.longest = longest

    def propose(self, tokens: Tensor, gamma: int) -> tuple[Tensor, None]:
        for n in range(min(self.longest, tokens.numel() - 1), 0, -1):
            windows = tokens[:-1].unfold(0, n, 1)
            hits = (windows == tokens[-n:]).all(dim=1).nonzero()
            if hits.numel():
                start = int(hits[-1, 0]) + n
                return tokens[start : start + gamma], None
        return tokens[:0], None


class NoDraft:
    """Plain decoding: nothing is proposed."""

    def propose(self, tokens: Tensor, gamma: int) -> tuple[Tensor, None]:
        return tokens[:0], None
