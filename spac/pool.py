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
Ctrl-C may end the forward thread's work at any line: the next `publish` takes up what it finds, at
worst a slot is lost.
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
    freed: list[int] = field(default_factory=list)  # slots of experts that have left
    unseen: bool = False  # slot_of has changed, and the kernels do not see it yet


class SlotPool:
    """`num_slots` equal slots shared by all layers, and the address table of every layer."""

    def __init__(self, layouts: list[ExpertLayout], num_slots: int, device: torch.device) -> None:
        num_layers, num_experts = len(layouts), layouts[0].num_experts
        self.slot_bytes = max(layout.blob_bytes for layout in layouts)
        self.num_slots = num_slots
        self.memory = torch.empty(num_slots, self.slot_bytes, dtype=torch.uint8, device=device)
        self.address = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
        self.slot_of = np.full((num_layers, num_experts), -1, dtype=np.int32)  # published
        self.held = np.zeros((num_layers, num_experts), dtype=bool)  # resident or on its way in
        self.loads = 0
        self.evictions = 0
        self._lock = threading.Lock()
        self._mail = [_Mailbox() for _ in layouts]
        self._reclaimed: deque[tuple[int, torch.cuda.Event | None]] = deque(
            (slot, None) for slot in range(num_slots)
        )

    # forward thread

    def publish(self, layer: int | None = None) -> None:
        """Make a layer's changes (None: all layers') visible to the kernels launched from here."""
        layers = range(len(self._mail)) if layer is None else (layer,)
        mails = [(self._mail[i], self.slot_of[i]) for i in layers]
        if not any(mail.leaving or mail.arriving or mail.unseen for mail, _ in mails):
            return
        with self._lock:
            for mail, slot_of in mails:
                mail.unseen = True
                while mail.leaving:
                    if (slot := int(slot_of[mail.leaving[-1]])) >= 0:
                        slot_of[mail.leaving[-1]], mail.freed = -1, [*mail.freed, slot]
                    mail.leaving.pop()
                while mail.arriving:
                    expert, slot = mail.arriving.pop()
                    slot_of[expert] = slot
            event = self._show(slice(None) if layer is None else slice(layer, layer + 1))
            for mail, _ in mails:
                freed = [(slot, event) for slot in mail.freed]
                mail.unseen, mail.freed = False, []
                self._reclaimed.extend(freed)

    def exchange(self, layer: int, old: list[int], new: list[int], blobs: list[Tensor]) -> None:
        """Experts `new`, whose weights `blobs` are on the device, take the slots of residents `old`
        in stream order: the kernels launched so far read the old ones, those to come the new."""
        here, slot_of, held = slice(layer, layer + 1), self.slot_of[layer], self.held[layer]
        with self._lock:
            if (slot_of[old] < 0).any() or not held[old].all() or held[new].any():
                raise ValueError(f"layer {layer}: no exchange of {old} for {new}")
            slots, self._mail[layer].unseen = slot_of[old], True
            slot_of[old], held[old] = -1, False
            self.evictions += len(old)
            self._show(here)  # first: no kernel may see a slot that is half written
            for expert, slot, blob in zip(new, slots, blobs, strict=True):
                self.memory[slot, : blob.numel()].copy_(blob)
                slot_of[expert], held[expert] = slot, True
                self.loads += 1
            self._show(here)
            self._mail[layer].unseen = False

    def complete(self, layer: int) -> bool:
        """Every expert of the layer is resident for the kernels launched from here."""
        return bool((self.slot_of[layer] >= 0).all())

    def _show(self, layers: slice) -> torch.cuda.Event | None:
        """Write the addresses of these layers; the event that the kernels launched so far, and this
        write, are done."""
        slots, target = self.slot_of[layers], self.address[layers]
        start = self.memory.data_ptr()
        rows = torch.from_numpy(np.where(slots >= 0, start + slots * np.int64(self.slot_bytes), 0))
        if not target.is_cuda:
            target.copy_(rows)
            return None
        target.copy_(rows.pin_memory(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return event

    # copy thread

    def evict(self, layer: int, expert: int) -> None:
        """Ask for the expert's slot; it comes back through `take` after its grace period."""
        with self._lock:
            self.held[layer, expert] = False
            self.evictions += 1
            self._mail[layer].leaving.append(expert)

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
        """The expert's weights are complete in `slot`: show them at the layer's next pass."""
        with self._lock:
            self.loads += 1
            self._mail[layer].arriving.append((expert, slot))

    def give_back(self, slot: int) -> None:
        """Return an unused slot taken with `take`."""
        with self._lock:
            self._reclaimed.append((slot, None))

    @property
    def pending(self) -> int:
        """Slots asked for or reclaimed, and not yet filled."""
        with self._lock:
            return len(self._reclaimed) + sum(len(m.leaving) for m in self._mail)
