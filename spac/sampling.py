"""Sampling by a seed: the text depends on the seed alone, not on draft or draft length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

Warp = Callable[[int, Tensor], Tensor]  # (length of the text, logits [W, V]) -> logits [W, V]
_MASK = (1 << 64) - 1


def make_warp(temperature: float, top_k: int, top_p: float) -> Warp:
    """transformers' warpers in its order; 0 and 1.0 switch top_k and top_p off."""
    warpers = LogitsProcessorList()
    if temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k > 0:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    nothing: Any = None  # none of them asks for the text
    return lambda length, logits: warpers(nothing, logits.float())


class Seeded:
    """A warp whose argmax is a sample: Gumbel noise is added, fixed by seed and text position.

    Row i of logits [W, V] decides position length + i of the text. Draft and
    target see the same noise at a position, so they often choose alike, and what the target
    chooses there does not depend on what was drafted (Daliri, Musco, Suresh 2024, "Coupling
    without Communication and Drafter-Invariant Speculative Decoding"). Slightly fewer drafts are
    accepted than by the standard rule.
    """

    def __init__(self, warp: Warp, seed: int, device: torch.device) -> None:
        self.warp, self.seed = warp, seed
        self._generator = torch.Generator(device)

    def __call__(self, length: int, logits: Tensor) -> Tensor:
        scores = self.warp(length, logits)
        noise = torch.empty_like(scores)
        for row in range(len(scores)):
            self._generator.manual_seed(_mix(self.seed, length + row))
            noise[row].exponential_(generator=self._generator)
        return scores - noise.log_()


def _mix(seed: int, position: int) -> int:
    """A 63-bit seed for one position (splitmix64): neighbours get unrelated streams."""
    z = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 1) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) >> 1
