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

Between two windows no kernel reads slots. If the forward thread says so (`quiet`), a missing expert
may take a resident's slot at once (`replace`), until the next `publish`, which has the kernels
behind it wait for the copies.

Ctrl-C may end the forward thread's work at any line: the next `publish` takes up what it finds, at
worst a slot is lost.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spac.layout import ExpertLayout

Places = tuple[NDArray[np.integer], NDArray[np.integer]]  # (layers, experts)


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
        self.stream: torch.cuda.Stream | None = None  # that the copy thread copies on
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
        self._rows = torch.zeros(
            self.address.shape, dtype=torch.int64, pin_memory=device.type == "cuda"
        )
        self.slot_of = np.full((num_layers, num_experts), -1, dtype=np.int32)  # published
        self.held = np.zeros((num_layers, num_experts), dtype=bool)  # resident or on its way in
        # From `take` until its copy is shown. Windows may bring an expert and take it away in the
        # meantime; in no other way it gives up a slot.
        self.coming = np.zeros((num_layers, num_experts), dtype=bool)
        # Set by the forward thread when every kernel that read slots has ended, until `publish`.
        self.quiet = False
        self._replaced = False  # since then: copies may be under way
        self.loads = 0
        self.evictions = 0
        self.kept = 0  # loads of experts that were on the GPU for another reason
        self.doubled = 0  # copies that were no loads: the expert had come by `exchanged` meanwhile
        self._lock = threading.Lock()
        self._mail = [_Mailbox() for _ in layouts]
        self._reclaimed: deque[tuple[int, torch.cuda.Event | None]] = deque(
            (slot, None) for slot in range(num_slots)
        )

    # forward thread

    @property
    def changed(self) -> bool:
        """There is something to publish."""
        mails = self._mail
        return self.quiet or any(m.leaving or m.arriving or m.unseen for m in mails)

    def publish(self, layer: int | None = None) -> None:
        """Make a layer's changes (None: all layers') visible to the kernels launched from here."""
        self.quiet = False
        layers = range(len(self._mail)) if layer is None else (layer,)
        mails = [(self._mail[i], self.slot_of[i], self.coming[i]) for i in layers]
        if not any(mail.leaving or mail.arriving or mail.unseen for mail, *_ in mails):
            return
        with self._lock:
            if self._replaced:
                if self.stream is not None:
                    torch.cuda.current_stream().wait_stream(self.stream)
                self._replaced = False
            for mail, slot_of, coming in mails:
                mail.unseen = True
                while mail.leaving:
                    if (slot := int(slot_of[mail.leaving[-1]])) >= 0:
                        slot_of[mail.leaving[-1]], mail.freed = -1, [*mail.freed, slot]
                    mail.leaving.pop()
                while mail.arriving:
                    expert, slot = mail.arriving.pop()
                    slot_of[expert] = slot
                    coming[expert] = False
            event = self._show(slice(None) if layer is None else slice(layer, layer + 1))
            for mail, *_ in mails:
                freed = [(slot, event) for slot in mail.freed]
                mail.unseen, mail.freed = False, []
                self._reclaimed.extend(freed)

    def show_again(self, layer: int) -> None:
        """Nobody knows what the kernels see of a layer; the next `publish` writes it again."""
        self._mail[layer].unseen = True

    def exchange(self, layer: int, old: list[int], new: list[int], blobs: list[Tensor]) -> None:
        """Experts `new`, whose weights `blobs` are on the device, take the slots of residents `old`
        in stream order: the kernels launched so far read the old ones, those to come the new."""
        here, slot_of, held = slice(layer, layer + 1), self.slot_of[layer], self.held[layer]
        with self._lock:
            if not self.settled((layer, old)).all() or held[new].any():
                raise ValueError(f"layer {layer}: no exchange of {old} for {new}")
            slots, self._mail[layer].unseen = slot_of[old], True
            slot_of[old], held[old] = -1, False
            self.evictions += len(old)
            self._show(here)  # first: no kernel may see a slot that is half written
            for expert, slot, blob in zip(new, slots, blobs, strict=True):
                self.memory[slot, : blob.numel()].copy_(blob)
                slot_of[expert], held[expert] = slot, True
                self.loads += 1
                self.kept += 1
            self._show(here)
            self._mail[layer].unseen = False

    def exchanged(self, layers: np.ndarray, newcomers: np.ndarray, victims: np.ndarray) -> None:
        """The device has put experts into residents' slots (`spac.pull`) and says so in the address
        table: the host follows, before the next `publish`. One window's, int [n] each."""
        with self._lock:
            self.slot_of[layers, newcomers] = self.slot_of[layers, victims]
            self.held[layers, victims] = self.coming[layers, victims]
            self.held[layers, newcomers] = True
            for i in np.flatnonzero([bool(self._mail[x].leaving) for x in layers]):
                leaving, victim = self._mail[layers[i]].leaving, victims[i]
                if victim in leaving:  # that was an eviction already
                    self.evictions -= 1
                    leaving.remove(victim)
            for i in np.flatnonzero([bool(self._mail[x].arriving) for x in layers]):
                mail = self._mail[layers[i]]
                for expert, slot in [m for m in mail.arriving if m[0] == newcomers[i]]:
                    self.loads -= 1
                    self.doubled += 1
                    self.coming[layers[i], expert] = False
                    mail.freed, mail.unseen = [*mail.freed, slot], True
                    mail.arriving.remove((expert, slot))
            self.loads += len(layers)
            self.evictions += len(layers)
            self.kept += len(layers)
            self.slot_of[layers, victims] = -1  # last: who is interrupted begins again

    def settled(self, places: Any) -> Any:
        """Which of the experts at these indices of [L, E] are residents that may give up their
        slot: none is leaving, of none a copy is under way."""
        return self.held[places] & ~self.coming[places] & (self.slot_of[places] >= 0)

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
            if self.settled((layer, expert)):
                self.held[layer, expert] = False
                self.evictions += 1
                self._mail[layer].leaving.append(expert)

    def replace(
        self, newcomers: Places, victims: Places, copy: Callable[[Any, Any, Any], None]
    ) -> NDArray[np.bool_]:
        """While the pool is quiet: missing experts take residents' slots, (layers, experts) each,
        int [n], into which copy(layers, experts, slots) begins to copy them. Which of them: none if
        the pool is not quiet any more, nor any pair of which one has come or gone."""
        with self._lock:
            # Before `quiet` is read: a `publish` that ends it meanwhile then waits for the lock.
            for layer in {*newcomers[0].tolist(), *victims[0].tolist()}:
                self._mail[layer].unseen = True
            slots = self.slot_of[victims]
            right = (self.slot_of[newcomers] < 0) & ~self.held[newcomers]
            right &= self.settled(victims) & self.quiet
            new, old = ((layers[right], experts[right]) for layers, experts in (newcomers, victims))
            slots = slots[right]
            self.slot_of[old], self.held[old] = -1, False
            self.evictions += len(slots)
            self._replaced |= len(slots) > 0
            if len(slots):
                copy(*new, slots)
            self.slot_of[new], self.held[new] = slots, True
            self.loads += len(slots)
            return right

    def take(self, layer: int, expert: int) -> int | None:
        """A slot that no kernel reads, for an expert that is not held, until `load`; or None if
        none has been reclaimed yet."""
        with self._lock:
            if not self._reclaimed:
                return None
            slot, event = self._reclaimed.popleft()
            self.held[layer, expert] = self.coming[layer, expert] = True
        if event is not None:
            event.synchronize()
        return slot

    def load(self, layer: int, expert: int, slot: int) -> None:
        """The expert's weights are complete in `slot`: show them at the layer's next pass. The slot
        is free again if the expert has come by `exchanged` meanwhile."""
        with self._lock:
            mail = self._mail[layer]
            if self.slot_of[layer, expert] >= 0 and expert not in mail.leaving:
                self.coming[layer, expert] = False
                self._reclaimed.append((slot, None))
                self.doubled += 1
                return
            self.loads += 1
            mail.arriving.append((expert, slot))

    @property
    def pending(self) -> int:
        """Slots asked for or reclaimed, and not yet filled."""
        with self._lock:
            return len(self._reclaimed) + sum(len(m.leaving) for m in self._mail)
