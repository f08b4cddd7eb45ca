"""The way of a layer's window to the CPU and back where the host program waits for it (eager)."""

from __future__ import annotations

import torch
from torch import Tensor


class Staging:
    """Pinned buffers for one layer's hand-over to the CPU and back, reused by every layer.

    Reuse is safe: `receive` waits for an event that lies behind the previous layer's copies.
    """

    def __init__(self, tokens: int, hidden: int, top_k: int) -> None:
        self._ids = torch.empty(tokens, top_k, dtype=torch.int32, pin_memory=True)
        self._weights = torch.empty(tokens, top_k, dtype=torch.float32, pin_memory=True)
        self._hidden = torch.empty(tokens, hidden, dtype=torch.float32, pin_memory=True)
        self._back = torch.empty(tokens, hidden, dtype=torch.float32, pin_memory=True)
        self._sent = torch.cuda.Event()

    def send(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        tokens = hidden.shape[0]
        self._ids[:tokens].copy_(ids, non_blocking=True)
        self._weights[:tokens].copy_(weights, non_blocking=True)
        self._hidden[:tokens].copy_(hidden.float(), non_blocking=True)
        self._sent.record()

    def receive(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        self._sent.synchronize()
        return self._hidden[:tokens], self._ids[:tokens], self._weights[:tokens]

    def send_back(self, rest: Tensor, device: torch.device) -> Tensor:
        back = self._back[: rest.shape[0]]
        back.copy_(rest)
        return back.to(device, non_blocking=True)
