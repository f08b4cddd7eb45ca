"""Experts that a window reads over the link: they come into GPU memory beside the other kernels.

`ops.split_window` chooses them and gives each a place: the slot of a resident that the window does
not need, where it then stays, or memory of the place's own. `Pull.start` begins to fill the places
on a stream of its own, and the expert FFN waits for the place of each expert that it needs. All of
it can be captured in a CUDA graph. Without a GPU the places are filled at once.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from spac.layout import ExpertLayout, Places
from spac.pool import SlotPool
from spac.state import Follower

MOST_PLACES = 8
_WAITING_UNITS = 32  # of an expert's intermediate units: what one waiting program computes


def most_places(layout: ExpertLayout, device: torch.device) -> int:
    """How many experts may be on their way at a time: the programs that wait for them must leave
    multiprocessors to those that bring them."""
    if device.type != "cuda":
        return MOST_PLACES
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    each = -(-layout.intermediate // _WAITING_UNITS)
    return max(1, min(MOST_PLACES, (processors - 1) // each))


class Pull:
    """Fills the places of one layer after the other, while the stream that chose them goes on.

    Without places (A = 0) it does nothing: what the GPU reads, its kernels read where it lies.
    """

    def __init__(self, memory: Tensor, exchanged: Tensor, layouts: list[ExpertLayout]) -> None:
        """memory uint8 [A, bytes] of the places; exchanged int32 [L, A, 2], a part of the state."""
        self._bytes = [layout.blob_bytes for layout in layouts]
        shape = len(layouts), layouts[0].num_experts
        # What experts are worth, float32 [L, E]; nothing stays until that is known.
        self.value = Follower(np.full(shape, -np.inf, dtype=np.float32), memory.device)
        self.places = Places.over(memory, self.value.tensor, exchanged)
        self._failed = self.places[0].failed.numpy()  # of all layers
        self._some = len(memory) > 0
        self._due: int | None = None  # the layer whose places are being chosen
        self._stream: torch.cuda.Stream | None = None
        if memory.is_cuda and self._some:
            # First in the queue, since those that wait for it must not keep it out.
            self._stream = torch.cuda.Stream(memory.device, priority=-2)

    def choose(self, layer: int) -> Places | None:
        """For `ops.split_window`; what it chooses is shown already, so `start` must follow."""
        if not self._some:
            return None
        self._due = layer
        return self.places[layer]

    def resume(self, pool: SlotPool) -> None:
        """Fill the slots of a window that Ctrl-C ended between `choose` and `start`."""
        if self._due is not None:
            places = self.places[self._due]
            places.source.masked_fill_(places.exchanged[:, 0] < 0, 0)
            pool.show_again(self._due)
            self.start(self._due)
            self.finish()

    def start(self, layer: int) -> None:
        """Begin with the layer's places, once the current stream has come here."""
        if not self._some:
            return
        places, nbytes = self.places[layer], self._bytes[layer]
        if self._stream is None:
            _fill(places, nbytes)
        else:
            from spac.kernels.pull import pull

            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                pull(places, nbytes)
        self._due = None

    def finish(self) -> None:
        """Let the current stream go on when all have come: the places may be used again."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def check(self) -> None:
        """RuntimeError if an expert did not come in time."""
        if self._failed[0]:
            raise RuntimeError("spac: an expert did not cross the link in time; detach and attach")

    def learn(self, exchanged: Tensor, pool: SlotPool) -> None:
        """Tell the pool what the last window exchanged: the state's part, in host memory. The
        caller sets it to -1 on the device."""
        rows = exchanged.numpy()
        layers, places = np.nonzero(rows[..., 0] >= 0)
        if len(layers):
            newcomers, victims = rows[layers, places].T
            new = pool.slot_of[layers, victims] >= 0  # else an interrupted call has told it already
            pool.exchanged(layers[new], newcomers[new], victims[new])


def _fill(places: Places, nbytes: int) -> None:
    for source, target in zip(places.source.tolist(), places.target.tolist(), strict=True):
        if source:
            ctypes.memmove(target, source, nbytes)
    places.flags.copy_(places.source != 0)
