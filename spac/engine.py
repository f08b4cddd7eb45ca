"""Runs the experts of an attached model over two memories: slots on the GPU, the rest on the CPU.

One forward of layer l (DESIGN section 2): publish the layer's slot changes; split the window's
pairs by residency, updating the utility in the same kernel; run the resident pairs on the GPU
while the CPU computes the others from host memory; add the two. A forward over more than
`max_window` tokens is prefill: it leaves the utility alone, and experts that are not resident pass
through two areas (`spac.prefill`) or are read straight from pinned host memory. On a machine
without a GPU both memories are host memory and both sides run on the CPU, one after the other.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from spac import ops
from spac.config import SpacConfig
from spac.control import Control, Snapshot
from spac.copier import CopyThread
from spac.cost import CostModel
from spac.handoff import HandOff
from spac.layout import ExpertTable
from spac.pool import SlotPool
from spac.prefill import Prefill, area_experts
from spac.split import Split, Work
from spac.staging import Staging
from spac.state import LayerState
from spac.store import HostStore

COUNTERS = ("pairs", "resident_pairs", "experts", "resident_experts")
_open: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Python ends its daemon threads where they are: inside C++ that would end the process."""
    for engine in list(_open):
        engine.close()


class Engine:
    """Experts of all layers of one model. `forward` is called by the layers, in order."""

    def __init__(
        self,
        store: HostStore,
        num_slots: int,
        top_k: int,
        device: torch.device,
        config: SpacConfig,
        costs: CostModel,
        first: np.ndarray | None = None,
    ) -> None:
        """first: scores [L, E] of the first fill; default the same number in every layer."""
        layouts = store.layouts
        num_layers, num_experts = len(layouts), layouts[0].num_experts
        self.store, self.config, self.device, self.top_k = store, config, device, top_k
        self.pool = SlotPool(layouts, num_slots, device)
        # What windows change, in one piece of memory: one copy shows it to the host.
        self._state = LayerState.zeros(num_layers, num_experts, device)
        self.utility, self.frequency = self._state.utility, self._state.frequency
        self.counters, self.streamed = self._state.counters, self._state.streamed
        # Every expert has a slot from the first fill on: the CPU never has anything to do.
        self._everything = num_slots >= num_layers * num_experts
        # How many of n missing experts the GPU reads from host memory itself; None: it does not.
        self.streams: Tensor | None = None
        wanted = self._cuda if config.stream_missing is None else config.stream_missing
        balanced = costs
        if wanted and not self._everything:
            balanced = costs.beside_link(num_experts)
        self.control = Control(config, balanced, num_layers, num_experts, top_k, num_slots)
        if balanced is not costs:
            self.control.split = Split(costs, num_experts)
            self._streams_shown = self.control.split.streams
            self.streams = torch.from_numpy(self._streams_shown).to(device)
        self.bounds = torch.from_numpy(self.control.bounds).to(device)
        self._bounds_shown = self.control.bounds
        self.copier = CopyThread(self.pool, store, self.control, config.max_copies, self.note)
        self.host_tables = [store.table(layer) for layer in range(num_layers)]
        self.slot_tables = [
            ExpertTable.from_blobs(layout, self.pool.address[layer], owner=self.pool.memory)
            for layer, layout in enumerate(layouts)
        ]
        self._host_address = torch.stack([t.address for t in self.host_tables]).to(device)
        # Of the prompt since the last window.
        self._prompt_pairs = torch.zeros_like(self.frequency)
        self._prompt_tokens = 0
        self._snapshot: Snapshot | None = None
        self.prefill: Prefill | None = None
        if self.streams is not None and area_experts(layouts[0]):
            self.prefill = Prefill(store, device, costs)
        self.windows = 0
        self.prefill_tokens = 0
        self._prefill_bytes = 0
        self.cpu_seconds = 0.0  # in the CPU's FFN
        self.spans: list[tuple[str, str, float, float]] | None = None  # spac.spans
        self._began = 0.0
        self.handoff: HandOff | None = None
        self.by_flags = False  # the layers called meanwhile hand over by flags (spac.handoff)
        # For settle: utility at the start of the window, and its ids.
        self._before: Tensor | None = None
        self._window_ids = torch.full(
            (num_layers, config.max_window, top_k), -1, dtype=torch.int32, device=device
        )
        self._width = 0
        # For the split: when the worker was busy in the last window, and what was counted before.
        self._worker_times: np.ndarray | None = None
        self._counted: tuple[np.ndarray, np.ndarray] | None = None
        self._staging: Staging | None = None
        self._forwarding = threading.Lock()
        self._process = os.getpid()
        if self._cuda:
            self._staging = Staging(config.max_window, layouts[0].hidden, top_k)
        self.copier.fill(first)

    def start(self) -> None:
        """Begin to copy and to solve, until `close`; nothing that is built before has a thread."""
        _open.add(self)
        if self.config.policy != "static":
            self.control.balancer.start()
            self.copier.start()

    @property
    def _cuda(self) -> bool:
        return self.device.type == "cuda"

    @torch.no_grad()
    def forward(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The experts of one layer: hidden [T, H], ids and weights [T, k]; returns [T, H]."""
        if os.getpid() != self._process:
            raise RuntimeError(
                "spac: this model was attached before a fork, and its threads are in the other "
                "process; call spac.detach(model) here, then attach again"
            )
        if not self._forwarding.acquire(blocking=False):
            raise RuntimeError("spac: this model is already running a forward in another thread")
        try:
            return self._forward(layer, hidden, ids.to(torch.int32), weights.float())
        finally:
            self._forwarding.release()

    def _forward(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if self.by_flags and self.handoff is not None:
            return self._handed(layer, hidden, ids, weights, self.handoff)
        prefill = hidden.shape[0] > self.config.max_window
        if layer == 0 and not prefill:
            self._begin_window(hidden.shape[0])
            self.launched()
        self.pool.publish(layer)
        if prefill:
            return self._prefill(layer, hidden, ids, weights)
        gpu_ids, cpu_ids, table = self._split(layer, ids)
        if self.pool.complete(layer):
            return ops.expert_ffn_table(hidden, gpu_ids, weights, table, hidden.dtype)
        if self._staging is not None:
            self._staging.send(hidden, cpu_ids, weights)
        partial = ops.expert_ffn_table(hidden, gpu_ids, weights, table)
        if self._staging is not None:
            hidden_host, cpu_ids, weights = self._staging.receive(hidden.shape[0])
        else:
            hidden_host = hidden
        if not bool((cpu_ids >= 0).any()):
            return partial.to(hidden.dtype)
        rest = self._on_cpu(layer, hidden_host, cpu_ids, weights)
        if self._staging is not None:
            rest = self._staging.send_back(rest, self.device)
        return ops.combine([partial, rest], hidden.dtype)

    def _split(self, layer: int, ids: Tensor) -> tuple[Tensor, Tensor, ExpertTable]:
        """ids [T, k] for the GPU and for the CPU, -1 elsewhere, and where the GPU finds experts;
        the utility moves on."""
        if self.config.rejected_weight < 1:
            self._window_ids[layer, : ids.shape[0]] = ids
        state = self.utility[layer], self.bounds[layer], self.counters[layer]
        address, most = self.pool.address[layer], self.config.max_utility
        table = self.slot_tables[layer]
        if self.streams is None:
            resident_ids, cpu_ids, counts, _, _ = ops.verify(ids, address, *state, most)
            self.frequency[layer] += counts
            return resident_ids, cpu_ids, table
        address, cpu_ids = ops.split_window(
            ids,
            address,
            self._host_address[layer],
            *state,
            self.frequency[layer],
            self.streams,
            self.streamed[layer],
            most,
        )
        return ids, cpu_ids, replace(table, address=address, owner=(table.owner, self.store))

    def _handed(
        self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor, handoff: HandOff
    ) -> Tensor:
        gpu_ids, cpu_ids, table = self._split(layer, ids)
        if self._everything:
            return ops.expert_ffn_table(hidden, gpu_ids, weights, table, hidden.dtype)
        handoff.send(layer, hidden, cpu_ids, weights)
        partial = ops.expert_ffn_table(hidden, gpu_ids, weights, table)
        return handoff.join(layer, partial, hidden.dtype)

    def _on_cpu(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        start = time.perf_counter()
        rows = ops.expert_ffn_table(hidden, ids, weights, self.host_tables[layer])
        self.cpu_seconds += time.perf_counter() - start
        self.note("cpu", f"layer {layer}", start)
        return rows

    def note(self, track: str, name: str, start: float) -> None:
        """For `spac.spans`: what began at `start` (time.perf_counter) has ended now."""
        if self.spans is not None:
            self.spans.append((track, name, start, time.perf_counter()))

    # The forward by flags (spac.target): between `begin_window` and `check` the host program
    # does nothing for a layer, so that a CUDA graph can hold all of them.

    def open_handoff(self, dtype: torch.dtype) -> None:
        """Start the worker that answers the windows, if it does not run."""
        if self.handoff is None:
            self.handoff = HandOff(
                self.host_tables, self.config.max_window, self.top_k, dtype, self.device
            )

    def begin_window(self, width: int) -> None:
        """Before a forward by flags over `width` tokens: every layer's slot changes, the bell."""
        assert self.handoff is not None
        self._begin_window(width)
        self.pool.publish()
        if not self._everything:
            self.handoff.begin(width)

    def check(self) -> None:
        """After a window by flags: RuntimeError if the CPU side failed."""
        if self.handoff is None:
            return
        self.handoff.check()
        times = self._worker_times = self.handoff.times.numpy() * 1e-9
        self.handoff.times.zero_()
        self.cpu_seconds += float((times[:, 1] - times[:, 0]).sum())
        if self.spans is not None:
            for layer, (start, end) in enumerate(times.tolist()):
                if start:
                    self.spans.append(("cpu", f"layer {layer}", start, end))

    def save(self) -> tuple[int, Tensor]:
        """What a window changes, for `load`."""
        return self.windows, self._state.memory.clone()

    def load(self, saved: tuple[int, Tensor]) -> None:
        """Undo what windows changed since `save`."""
        self.windows, memory = saved
        self._state.memory.copy_(memory)

    @property
    def streamed_bytes(self) -> int:
        """What the GPU read of experts in host memory: in prefill, and of windows' missing ones."""
        blob = self.store.layouts[0].blob_bytes
        prefill = 0 if self.prefill is None else self.prefill.copied
        return self._prefill_bytes + prefill + blob * int(self.streamed.sum())

    def _prefill(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if layer == 0:
            self.prefill_tokens += hidden.shape[0]
            self._prompt_tokens += hidden.shape[0]
        _count(self._prompt_pairs[layer], ids)
        table = self.slot_tables[layer]
        if self.prefill is not None and not self.pool.complete(layer):
            # Before the first window nobody knows better than the prompt what to hold.
            first = self.windows == 0 and self.control.prior is None
            pool = self.pool if first and self.config.policy != "static" else None
            total = self.prefill.forward(layer, hidden, ids, weights, table, pool)
            return total.to(hidden.dtype)
        slots, host = self.pool.address[layer], self._host_address[layer]
        table = replace(table, address=torch.where(slots != 0, slots, host), owner=self.store)
        missing = int((self.pool.slot_of[layer] < 0).sum())
        self._prefill_bytes += missing * self.store.layouts[layer].blob_bytes
        return ops.expert_ffn_table(hidden, ids, weights, table, hidden.dtype)

    def _begin_window(self, width: int) -> None:
        if self.copier.error is not None:
            raise RuntimeError(
                f"spac: the copy thread stopped: {self.copier.error}"
            ) from self.copier.error
        last_width, self._width = self._width, width
        self.windows += 1
        self._began = time.perf_counter()
        split = self.control.split
        if split is not None and self.streams is not None:
            streams = split.streams
            if streams is not self._streams_shown:
                self.streams.copy_(torch.from_numpy(streams))
                self._streams_shown = streams
        bounds = self.control.bounds
        if bounds is not self._bounds_shown:
            self.bounds.copy_(torch.from_numpy(bounds))
            self._bounds_shown = bounds
        if self.config.rejected_weight < 1:
            self._before = self.utility.clone()
        if self.copier.is_alive():
            state = self._state.on_host()
            prompt = None if self._snapshot is None else self._snapshot.prompt  # one never sent
            if self._prompt_tokens:
                prompt = self._prompt_pairs.cpu().numpy() * (width / self._prompt_tokens)
                self._prompt_pairs.zero_()
                self._prompt_tokens = 0
            self._snapshot = Snapshot(
                self.windows,
                time.perf_counter(),
                state.utility.numpy(),
                state.frequency.numpy(),
                prompt,
                self._work(last_width, state),
            )

    def _work(self, width: int, state: LayerState) -> Work | None:
        """Of the last window, if it went by flags."""
        times, self._worker_times = self._worker_times, None
        before, self._counted = self._counted, (state.counters.numpy(), state.streamed.numpy())
        if times is None or before is None:
            return None
        assert self.handoff is not None
        waited = self.handoff.waited.cpu().numpy() * 1e-6
        counts, streamed = (now - then for now, then in zip(self._counted, before, strict=True))
        return Work(width, counts, streamed[:, 0], times, waited)

    def launched(self) -> None:
        """The host has nothing more to do for the window: the copy thread may have its turn.

        Not before, because both need Python's lock.
        """
        if self._snapshot is not None:
            self.copier.submit(self._snapshot)
            self._snapshot = None

    def settle(self, accepted: Tensor) -> None:
        """After a verify window: count the pairs of rejected tokens by `rejected_weight`."""
        self.note("windows", f"window {self.windows}, {self._width} tokens", self._began)
        if self._before is None:
            return
        ops.settle(
            self.utility,
            self._before,
            self._window_ids[:, : self._width].contiguous(),
            accepted,
            self.bounds,
            self.config.rejected_weight,
            self.config.max_utility,
        )

    def close(self) -> None:
        """Stop the threads, again if that was interrupted; no forward may be running. The store
        keeps the weights."""
        if os.getpid() != self._process:
            return  # after a fork: the threads, and a GPU's context, belong to the other process
        self.copier.close()
        self.control.close()
        if self.handoff is not None:
            self.handoff.close()
        if self._cuda:
            torch.cuda.synchronize(self.device)
        _open.discard(self)


def _count(pairs: Tensor, ids: Tensor) -> None:
    """Add the pairs of ids [T, k] to those of each expert, int64 [E]."""
    valid = (ids >= 0) & (ids < len(pairs))
    pairs.scatter_add_(0, torch.where(valid, ids, 0).flatten().long(), valid.flatten().long())
