"""The slot pool: which experts are on the GPU, and the protocol that changes it.

Two threads meet here. The *forward* thread launches kernels and, when it comes past layer l,
publishes what changed in layer l. The *copy* thread fills slots. No kernel ever reads a slot that
is being written (DESIGN section 4, "Engine"), because a slot goes round like this:

    resident --evict()--> leaving --publish()--> reclaimed --take()--> being filled
        ^                                                                   |
        +------------------publish()<-- arriving <--load()-----------------+

`publish` zeroes the address of a leaving expert in stream order and records an event after it;
`take` waits for that event, so every kernel that could have read the slot is done. `load` is
called when the copy has completed; the next `publish` of the layer makes the expert visible.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from spac.layout import ExpertLayout


@dataclass
class _Mailbox:
    leaving: list[int] = field(default_factory=list)  # experts
    arriving: list[tuple[int, int]] = field(default_factory=list)  # (expert, slot)


class SlotPool:
    """`num_slots` equal slots shared by all layers, and the address table of every layer."""

    def __init__(self, layouts: list[ExpertLayout], num_slots: int, device: torch.device) -> None:
        num_layers, num_experts = len(layouts), layouts[0].num_experts
        self.slot_bytes = max(layout.blob_bytes for layout in layouts)
        self.num_slots = num_slots
        self.memory = torch.empty(num_slots, self.slot_bytes, dtype=torch.uint8, device=device)
        self.address = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
        self._rows = torch.zeros(
            self.address.shape, dtype=torch.int64, pin_memory=device.type == "cuda"
        )
        self.slot_of = np.full((num_layers, num_experts), -1, dtype=np.int32)  # published
        self.held = np.zeros((num_layers, num_experts), dtype=bool)  # resident or on its way in
        self.loads = 0
        self.evictions = 0
        self.kept = 0  # loads of experts that were on the GPU for another reason
        self._lock = threading.Lock()
        self._mail = [_Mailbox() for _ in layouts]
        self._reclaimed: deque[tuple[int, torch.cuda.Event | None]] = deque(
            (slot, None) for slot in range(num_slots)
        )

    # forward thread

    def publish(self, layer: int | None = None) -> None:
        """Make a layer's changes (None: all layers') visible to the kernels launched from here."""
        layers = range(len(self._mail)) if layer is None else (layer,)
        if not any(self._mail[i].leaving or self._mail[i].arriving for i in layers):
            return
        with self._lock:
            freed = []
            for i in layers:
                mail, self._mail[i] = self._mail[i], _Mailbox()
                for expert in mail.leaving:
                    freed.append(int(self.slot_of[i, expert]))
                    self.slot_of[i, expert] = -1
                for expert, slot in mail.arriving:
                    self.slot_of[i, expert] = slot
            event = self._show(slice(None) if layer is None else slice(layer, layer + 1))
            self._reclaimed.extend((slot, event) for slot in freed)

    def exchange(self, layer: int, old: list[int], new: list[int], blobs: list[Tensor]) -> None:
        """Experts `new`, whose weights `blobs` are on the device, take the slots of residents `old`
        in stream order: the kernels launched so far read the old ones, those to come the new."""
        with self._lock:
            for leaves, comes, blob in zip(old, new, blobs, strict=True):
                slot = int(self.slot_of[layer, leaves])
                if slot < 0 or not self.held[layer, leaves] or self.held[layer, comes]:
                    raise ValueError(f"layer {layer}: no exchange of {leaves} for {comes}")
                self.memory[slot, : blob.numel()].copy_(blob)
                self.slot_of[layer, [leaves, comes]] = -1, slot
                self.held[layer, [leaves, comes]] = False, True
            self.loads += len(new)
            self.evictions += len(old)
            self.kept += len(new)
            self._show(slice(layer, layer + 1))

    def exchanged(self, layers: np.ndarray, newcomers: np.ndarray, victims: np.ndarray) -> None:
        """The device has put experts into residents' slots (`spac.pull`) and says so in the address
        table: the host follows, before the next `publish`. One window's, int [n] each."""
        with self._lock:
            before = self.held[layers, victims]
            self.slot_of[layers, newcomers] = self.slot_of[layers, victims]
            self.slot_of[layers, victims] = -1
            self.held[layers, victims] = False
            self.held[layers, newcomers] = True
            self.loads += len(layers)
            self.evictions += len(layers)
            self.kept += len(layers)
            for i in np.flatnonzero([bool(self._mail[x].leaving) for x in layers]):
                leaving, victim = self._mail[layers[i]].leaving, victims[i]
                if victim in leaving:  # that was an eviction already
                    leaving.remove(victim)
                    self.evictions -= 1
                    self.held[layers[i], victim] = before[i]
            for i in np.flatnonzero([bool(self._mail[x].arriving) for x in layers]):
                mail = self._mail[layers[i]]
                for expert, slot in [m for m in mail.arriving if m[0] == newcomers[i]]:
                    mail.arriving.remove((expert, slot))
                    self._reclaimed.append((slot, None))
                    self.loads -= 1

    def complete(self, layer: int) -> bool:
        """Every expert of the layer is resident for the kernels launched from here."""
        return bool((self.slot_of[layer] >= 0).all())

    def _show(self, layers: slice) -> torch.cuda.Event | None:
        """Write the addresses of these layers; the event that the kernels launched so far, and this
        write, are done."""
        slots, rows = self.slot_of[layers], self._rows[layers]
        start, size = self.memory.data_ptr(), np.int64(self.slot_bytes)
        rows.copy_(torch.from_numpy(np.where(slots >= 0, start + slots * size, 0)))
        # A copy that is still waiting may take these rows already: they are as good for it.
        self.address[layers].copy_(rows, non_blocking=True)
        if not self.address.is_cuda:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    # copy thread

    def evict(self, layer: int, expert: int) -> None:
        """Ask for the expert's slot; it comes back through `take` after its grace period. Nothing
        if the expert has left in the meantime."""
        with self._lock:
            leaving = self._mail[layer].leaving
            if expert in leaving or self.slot_of[layer, expert] < 0:
                return
            self.held[layer, expert] = False
            self.evictions += 1
            leaving.append(expert)

    def take(self) -> int | None:
        """A slot that no kernel reads, or None if none has been reclaimed yet."""
        with self._lock:
            if not self._reclaimed:
                return None
            slot, event = self._reclaimed.popleft()
        if event is not None:
            event.synchronize()
        return slot

    def load(self, layer: int, expert: int, slot: int) -> None:
        """The expert's weights are complete in `slot`: show them at the layer's next pass. The slot
        is free again if the expert has come by `exchanged` meanwhile."""
        with self._lock:
            mail = self._mail[layer]
            if self.slot_of[layer, expert] >= 0 and expert not in mail.leaving:
                self._reclaimed.append((slot, None))
                return
            self.loads += 1
            mail.arriving.append((expert, slot))

    def give_back(self, slot: int) -> None:
        """Return an unused slot taken with `take`."""
        with self._lock:
            self._reclaimed.append((slot, None))

    @property
    def pending(self) -> int:
        """Slots asked for or reclaimed, and not yet filled."""
        with self._lock:
            return len(self._reclaimed) + sum(len(m.leaving) for m in self._mail)
