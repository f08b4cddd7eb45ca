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
    """Proposes tokens that may follow a text, which grows from call to call."""

    def propose(self, text: list[int], gamma: int) -> tuple[Tensor, Tensor | None]:
        """Drafted ids int64 [g <= gamma] and their distributions fp32 [g, V], None if one-hot."""
        ...

    def accepted(self, count: int) -> None:
        """The next text goes on with so many of the tokens that were proposed last."""
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
        self._cached = 0  # tokens that the cache holds
        self._agreed = 0  # of them, that are in the next text for sure
        self.launched: Callable[[], None] = _nothing  # hears of the first step

    def propose(self, text: list[int], gamma: int) -> tuple[Tensor, Tensor | None]:
        device = self.model.device
        keep = min(self._agreed, len(text) - 1)  # at least one token is left to feed
        if keep < self._cached:
            self.target.finish(self._cached - keep)
            self._cached = keep
        self._agreed = len(text)
        if not gamma:
            return torch.empty(0, dtype=torch.int64, device=device), None
        new = torch.tensor(text[self._cached :], device=device)
        drafted: list[Tensor] = []
        probs: list[Tensor] = []
        for _ in range(gamma):
            # Two: after a window that was accepted whole, its last token is new here as well.
            feed = self.target.verify if new.numel() <= 2 else self.target.prefill
            logits = feed(new)[-1:]
            if not drafted:
                self.launched()
            self._cached += new.numel()
            if self.warp is not None:
                logits = self.warp(self._cached, logits)
            if self.generator is None:
                new = logits.argmax(-1)
            else:
                p = torch.softmax(logits.float(), dim=-1)
                new = torch.multinomial(p[0], 1, generator=self.generator)
                probs.append(p)
            drafted.append(new)
        return torch.cat(drafted), torch.cat(probs) if probs else None

    def accepted(self, count: int) -> None:
        self._agreed += count


def _nothing() -> None:
    pass


class NgramDraft:
    """Prompt lookup: what followed the latest earlier occurrence of the last n tokens.

    Longest suffix first, n = 4..1 (Saxena 2023, "Prompt Lookup Decoding").
    """

    def __init__(self, longest: int = 4) -> None:
        self.longest = longest
        self._after: dict[tuple[int, ...], int] = {}  # where the text goes on behind these tokens
        self._known = 0  # tokens of the text behind which that is known

    def propose(self, text: list[int], gamma: int) -> tuple[Tensor, None]:
        for end in range(self._known + 1, len(text)):
            for n in range(1, min(self.longest, end) + 1):
                self._after[tuple(text[end - n : end])] = end
        self._known = len(text) - 1
        for n in range(min(self.longest, len(text) - 1), 0, -1):
            start = self._after.get(tuple(text[-n:]))
            if start is not None:
                return torch.tensor(text[start : start + gamma], dtype=torch.int64), None
        return torch.empty(0, dtype=torch.int64), None

    def accepted(self, count: int) -> None:
        pass


class NoDraft:
    """Plain decoding: nothing is proposed."""

    def propose(self, text: list[int], gamma: int) -> tuple[Tensor, None]:
        return torch.empty(0, dtype=torch.int64), None

    def accepted(self, count: int) -> None:
        pass
