"""What windows change on the device, in one piece of memory, and what the host changes there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerState:
    """Views of `memory`: utility int32 [L, E], frequency int64 [L, E] (pairs since attach),
    counters int64 [L, 4] (`ops.verify`), streamed int64 [L, 1] (experts), waited int32 [L]
    (`HandOff`), exchanged int32 [L, A, 2] (`spac.pull`)."""

    memory: Tensor
    staging: Tensor  # in host memory, for copies of it
    utility: Tensor
    frequency: Tensor
    counters: Tensor
    streamed: Tensor
    waited: Tensor
    exchanged: Tensor

    @staticmethod
    def new(layers: int, experts: int, places: int, device: torch.device) -> LayerState:
        """Zeros, and nothing exchanged."""
        size = layers * (8 * (experts + 4 + 1) + 4 * (experts + 1 + 2 * places))
        memory = torch.zeros(size, dtype=torch.uint8, device=device)
        staging = torch.zeros(size, dtype=torch.uint8, pin_memory=memory.is_cuda)
        state = LayerState._of(memory, staging, layers, experts)
        state.exchanged.fill_(-1)
        return state

    @staticmethod
    def _of(memory: Tensor, staging: Tensor, layers: int, experts: int) -> LayerState:
        sizes = [8 * layers * experts, 8 * layers * 4, 8 * layers, 4 * layers * experts, 4 * layers]
        *most, exchanged = memory.split([*sizes, len(memory) - sum(sizes)])
        frequency, counters, streamed, utility, waited = most
        return LayerState(
            memory,
            staging,
            utility.view(torch.int32).view(layers, experts),
            frequency.view(torch.int64).view(layers, experts),
            counters.view(torch.int64).view(layers, 4),
            streamed.view(torch.int64).view(layers, 1),
            waited.view(torch.int32),
            exchanged.view(torch.int32).view(layers, len(exchanged) // (8 * layers), 2),
        )

    def send(self) -> torch.cuda.Event | None:
        """Begin a copy to the host, for `receive`."""
        self.staging.copy_(self.memory, non_blocking=True)
        if not self.memory.is_cuda:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def receive(self, sent: torch.cuda.Event | None) -> LayerState:
        """A copy in host memory, as things stood at `send`."""
        if sent is not None:
            sent.synchronize()
        # By numpy: torch copies so much with several threads, which then spin for milliseconds on
        # the cores of the CPU's FFN.
        memory = torch.from_numpy(self.staging.numpy().copy())
        return LayerState._of(memory, self.staging, *self.utility.shape)


class Follower:
    """`tensor` on the device: an array of the host that is replaced now and then, never changed."""

    def __init__(self, array: np.ndarray, device: torch.device) -> None:
        self.tensor = torch.tensor(array, device=device)
        self._staging = torch.empty_like(self.tensor, device="cpu", pin_memory=self.tensor.is_cuda)
        self._shown = array

    def follow(self, array: np.ndarray) -> None:
        """Show `array` to the kernels launched from here; those launched before have ended."""
        if array is not self._shown:
            self._staging.copy_(torch.from_numpy(array))
            self.tensor.copy_(self._staging, non_blocking=True)
            self._shown = array
