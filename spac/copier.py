"""The copy thread: fills slots with the experts of the highest score, evicts the lowest."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from spac.control import Control, Snapshot
from spac.pool import SlotPool
from spac.store import HostStore

# Copies that are begun before the thread sleeps until they have arrived: while every core is busy
# with experts, to wake it can take longer than a copy.
AHEAD = 8


class CopyThread(threading.Thread):
    """One round per window, on the latest snapshot. An exception is kept in `error`.

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
        self._note = note
        # Pairs of each expert before it could have met one in its slot; -1: not copied by a round.
        self._pairs = np.full(pool.held.shape, -1, dtype=np.int64)
        self._fresh: list[tuple[int, int]] = []  # copied in the last round
        self._coming: list[tuple[int, int, int]] = []  # (layer, expert, slot) under way
        self._began = 0.0
        self._unlimited = 0  # rounds that may exchange every slot: after a prompt
        self._inbox: queue.SimpleQueue[Snapshot | None] = queue.SimpleQueue()
        self._stream: torch.cuda.Stream | None = None
        if pool.memory.is_cuda:
            self._stream = torch.cuda.Stream(pool.memory.device)
            self._copied = torch.cuda.Event(blocking=True)  # waits asleep: the CPU's FFN has work

    def submit(self, snapshot: Snapshot) -> None:
        """Start a round. Rounds that come late are skipped, the latest snapshot counts."""
        self._inbox.put(snapshot)

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
        for layer, expert in _sorted(scores, everything, descending=True)[: self.pool.num_slots]:
            slot = self.pool.take()
            assert slot is not None
            self._copy(layer, expert, slot)
        self._arrive()
        for layer in range(num_layers):
            self.pool.publish(layer)

    def run(self) -> None:
        try:
            while (snapshot := self._latest()) is not None:
                self._round(snapshot)
        except BaseException as error:  # reported by the forward thread
            self.error = error

    def _latest(self) -> Snapshot | None:
        snapshot = self._inbox.get()
        while snapshot is not None and not self._inbox.empty():
            newer = self._inbox.get()
            if newer is not None and newer.prompt is None:
                newer = replace(newer, prompt=snapshot.prompt)
            snapshot = newer
        return snapshot

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
        wanted = _sorted(scores, missing, descending=True)[:most]
        copied = 0
        for layer, expert in wanted:
            slot = pool.take()
            if slot is None:
                break
            self._copy(layer, expert, slot)
            copied += 1
            self._pairs[layer, expert] = snapshot.frequency[layer, expert]
            self._fresh.append((int(layer), int(expert)))
        self._arrive()
        waiting = wanted[copied + pool.pending :]
        victims = _sorted(scores, pool.held & (pool.slot_of >= 0), descending=False)
        for newcomer, victim in zip(waiting, victims, strict=False):
            if scores[tuple(newcomer)] <= scores[tuple(victim)] + self.control.margin:
                break
            place = int(victim[0]), int(victim[1])
            self.wasted += int(self._pairs[place] == snapshot.frequency[place])
            self._pairs[place] = -1
            pool.evict(*place)
        self.control.appraise(scores, pool.held, pool.slot_of >= 0)

    def _copy(self, layer: int, expert: int, slot: int) -> None:
        """Begin a copy; `_arrive` shows it."""
        if not self._coming:
            self._began = time.perf_counter()
        blob = self.store.blobs[layer][expert]
        target = self.pool.memory[slot, : blob.numel()]
        self.pool.held[layer, expert] = True
        if self._stream is None:
            target.copy_(blob)
        else:
            with torch.cuda.stream(self._stream):
                target.copy_(blob, non_blocking=True)
        self.bytes_copied += blob.numel()
        self._coming.append((int(layer), int(expert), slot))
        if len(self._coming) == AHEAD:
            self._arrive()

    def _arrive(self) -> None:
        """Wait for the copies under way, then show them to the forward thread."""
        if not self._coming:
            return
        if self._stream is not None:
            self._copied.record(self._stream)
            self._copied.synchronize()
        for place in self._coming:
            self.pool.load(*place)
        self._note("link", f"{len(self._coming)} experts", self._began)
        self._coming.clear()


def _sorted(scores: np.ndarray, mask: np.ndarray, descending: bool) -> np.ndarray:
    """(layer, expert) rows where `mask`, by score, ties in index order."""
    where = np.argwhere(mask)
    key = scores[mask]
    return where[np.argsort(-key if descending else key, kind="stable")]
