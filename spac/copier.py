"""The copy thread: fills slots with the experts of the highest score, evicts the lowest."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from spac import keep
from spac.control import Control, Idle, Snapshot
from spac.pool import SlotPool
from spac.store import HostStore

# Copies that are begun before the thread sleeps until they have arrived: while every core is busy
# with experts, to wake it can take longer than a copy.
AHEAD = 8


class CopyThread(threading.Thread):
    """One round per window, on the latest snapshot, one exchange per draft. An exception is kept in
    `error`.

    `late` counts copies whose expert had pairs while they were under way, `wasted` those that were
    evicted before a pair met them in their slot. note(track, name, start) hears of what arrives.
    """

    def __init__(
        self,
        pool: SlotPool,
        store: HostStore,
        control: Control,
        max_copies: int,
        note: Callable[[str, str, float], None] = lambda track, name, start: None,
    ) -> None:
        super().__init__(name="spac-copy", daemon=True)
        self.pool, self.store, self.control, self.max_copies = pool, store, control, max_copies
        self.error: BaseException | None = None
        self.bytes_copied = self.late = self.wasted = 0
        self.bytes_in_drafts = 0  # of those copied, while a draft ran
        self._note = note
        # Pairs of each expert before it could have met one in its slot; -1: not copied by a round.
        self._pairs = np.full(pool.held.shape, -1, dtype=np.int64)
        self._fresh: list[tuple[int, int]] = []  # copied in the last round
        self._coming: list[tuple[int, int, int]] = []  # (layer, expert, slot) under way
        self._began = 0.0
        self._unlimited = 0  # rounds that may exchange every slot: after a prompt
        self.begun = threading.Event()  # the copies of the last exchange have begun
        self._inbox: queue.SimpleQueue[Snapshot | Idle | None] = queue.SimpleQueue()
        self._stream = pool.stream
        if self._stream is not None:
            self._copied = torch.cuda.Event(blocking=True)  # waits asleep: the CPU's FFN has work

    def submit(self, work: Snapshot | Idle) -> None:
        """Start a round, or an exchange while the pool is quiet. Rounds that come late are skipped,
        the latest snapshot counts."""
        self._inbox.put(work)

    def close(self) -> None:
        """Finish the round in progress and stop; returns when the thread has ended."""
        self._inbox.put(None)
        if self.is_alive():
            self.join()

    def fill(self, scores: np.ndarray | None = None) -> None:
        """First residents, before any forward: those of the highest score [L, E].

        Without scores the same number of experts in every layer.
        """
        num_layers, num_experts = self.pool.slot_of.shape
        if scores is None:
            scores = np.broadcast_to(-np.arange(num_experts), (num_layers, num_experts))
        everything = np.ones_like(self.pool.held)
        for index in keep.ranked(scores, everything)[: self.pool.num_slots]:
            place = self._place(index)
            slot = self.pool.take(*place)
            assert slot is not None
            self._fetch(*place, slot)
        self._arrive()
        self.pool.publish()

    def run(self) -> None:
        try:
            while (work := self._latest()) is not None:
                snapshot, idle = work
                if snapshot is not None:
                    self._round(snapshot)
                if idle is not None:
                    self._exchange(idle)
        except BaseException as error:  # reported by the forward thread
            self.error = error

    def _latest(self) -> tuple[Snapshot | None, Idle | None] | None:
        """What to do next, once there is something; None: stop."""
        snapshot = idle = None
        while (work := self._inbox.get()) is not None:
            if isinstance(work, Idle):
                idle = work
            else:  # a window has begun: the draft before it has ended
                idle, prompt = None, work.prompt
                if prompt is None and snapshot is not None:
                    prompt = snapshot.prompt
                snapshot = replace(work, prompt=prompt)
            if self._inbox.empty():
                return snapshot, idle
        return None

    def _round(self, snapshot: Snapshot) -> None:
        pool = self.pool
        for place in self._fresh:
            self.late += int(snapshot.frequency[place] > self._pairs[place])
            self._pairs[place] = snapshot.frequency[place]
        self._fresh.clear()
        self.control.observe(snapshot, pool.held)
        scores = self.control.scores()
        missing = ~pool.held & self.control.wanted()
        most = self.max_copies
        if snapshot.prompt is not None and most and not self.control.keeps:
            self._unlimited = 2  # one that evicts, one that fills the slots
        if self._unlimited:
            most, self._unlimited = pool.num_slots, self._unlimited - 1
        wanted = keep.ranked(scores, missing)[:most]
        copied = 0
        for index in wanted:
            place = self._place(index)
            slot = pool.take(*place)
            if slot is None:
                break
            self._fetch(*place, slot)
            copied += 1
            self._pairs[place] = snapshot.frequency[place]
            self._fresh.append(place)
        self._arrive()
        waiting, here = wanted[copied + pool.pending :], pool.held & (pool.slot_of >= 0)
        for victim in keep.exchange(scores, waiting, here, self.control.margin)[1]:
            place = self._place(victim)
            self._forget(place, snapshot.frequency)
            pool.evict(*place)
        self.control.appraise(scores, pool.held, pool.slot_of >= 0)

    def _exchange(self, idle: Idle) -> None:
        """While a draft runs: as many experts as the link carries until it ends take residents'
        slots at once. The next window's kernels wait for them, the next round need not."""
        pool, began, before = self.pool, time.perf_counter(), self.bytes_copied
        resident = pool.slot_of >= 0
        flat = self.control.exchange(idle.pairs, pool.held, resident, self._fit(idle))
        most = self._fit(idle)  # choosing has taken some time
        new, old = (self._place(indices[:most]) for indices in flat)
        done = pool.replace(new, old, self._copy)
        self.bytes_in_drafts += self.bytes_copied - before
        new, old = ((layers[done], experts[done]) for layers, experts in (new, old))
        self._forget(old, idle.frequency)
        self._pairs[new] = idle.frequency[new]
        self.begun.set()
        if done.any():
            self._wait()
            self._note("link", f"{done.sum()} experts", began)

    def _fit(self, idle: Idle) -> int:
        """Experts that the link carries until the draft ends."""
        seconds = max(idle.until - time.perf_counter(), 0.0)
        return int(seconds / float(self.control.costs.h2d(1)))

    def _place(self, index: Any) -> tuple[Any, Any]:
        """(layer, expert) of a flat index, or (layers, experts) of an array of them."""
        return divmod(index, self.pool.held.shape[1])

    def _forget(self, places: Any, frequency: np.ndarray) -> None:
        """The experts at these indices are evicted, when every expert had `frequency` pairs."""
        self.wasted += int(np.sum(self._pairs[places] == frequency[places]))
        self._pairs[places] = -1

    def _fetch(self, layer: int, expert: int, slot: int) -> None:
        """Begin a copy into a free slot; `_arrive` shows it."""
        if not self._coming:
            self._began = time.perf_counter()
        self._copy([layer], [expert], [slot])
        self._coming.append((layer, expert, slot))
        if len(self._coming) == AHEAD:
            self._arrive()

    def _copy(self, layers: Sequence[int], experts: Sequence[int], slots: Sequence[int]) -> None:
        """Begin to copy experts into slots, in one call that leaves Python to the forward."""
        blobs = [self.store.blobs[i][e] for i, e in zip(layers, experts, strict=True)]
        rows = zip(slots, blobs, strict=True)
        targets = [self.pool.memory[slot, : blob.numel()] for slot, blob in rows]
        with torch.cuda.stream(self._stream):
            torch._foreach_copy_(targets, blobs, non_blocking=True)
        self.bytes_copied += sum(blob.numel() for blob in blobs)

    def _arrive(self) -> None:
        """Wait for the copies under way, then show them to the forward thread."""
        if not self._coming:
            return
        self._wait()
        for place in self._coming:
            self.pool.load(*place)
        self._note("link", f"{len(self._coming)} experts", self._began)
        self._coming.clear()

    def _wait(self) -> None:
        """Sleep until the copies begun so far have arrived."""
        if self._stream is not None:
            self._copied.record(self._stream)
            self._copied.synchronize()
