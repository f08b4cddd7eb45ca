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
from spac.idle import Drafts
from spac.layout import ExpertTable
from spac.pool import SlotPool
from spac.prefill import Prefill, Prompt, area_experts
from spac.pull import Pull, most_places
from spac.split import Split, WorkClock
from spac.staging import Staging
from spac.state import Follower, LayerState
from spac.store import HostStore

Rows = tuple[Tensor, Tensor, Tensor]  # hidden [T, H], ids and weights [T, k]
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
        self.costs = costs  # as measured
        self.pool = SlotPool(layouts, num_slots, device)
        # Every expert has a slot from the first fill on: the CPU never has anything to do.
        self._everything = num_slots >= num_layers * num_experts
        # How many of n missing experts the GPU reads from host memory; None: it does not.
        self.streams: Tensor | None = None
        wanted, balanced = config.stream_missing, costs
        if (self._cuda if wanted is None else wanted) and not self._everything:
            balanced = costs.beside_link(num_experts)
        self.control = Control(config, balanced, num_layers, num_experts, top_k, num_slots)
        if balanced is not costs:
            self.control.keeps = area_experts(layouts[0]) > 0
            # What stays needs no copy: the link may as well read.
            self.control.split = Split(costs, num_experts, 1.0 if self.control.keeps else 1.05)
            self._streams = Follower(self.control.split.streams, device)
            self.streams = self._streams.tensor
        self.prefill: Prefill | None = None
        room = torch.empty(0, 0, dtype=torch.uint8, device=device)
        if self.control.keeps:
            self.prefill = Prefill(store, device, costs)
            room = self.prefill.room[: most_places(layouts[0], device)]
        # What windows change, in one piece of memory: one copy shows it to the host.
        self._state = LayerState.new(num_layers, num_experts, len(room), device)
        self.utility, self.frequency = self._state.utility, self._state.frequency
        self.counters, self.streamed = self._state.counters, self._state.streamed
        self.pull = Pull(room, self._state.exchanged, layouts)
        self._bounds = Follower(self.control.bounds, device)
        self.bounds = self._bounds.tensor
        self.copier = CopyThread(self.pool, store, self.control, config.max_copies, self.note)
        self.drafts = Drafts(self.pool, self.copier, self._state, self.pull)
        self.drafts.wanted = self.control.keeps and config.draft_copies
        self.host_tables = [store.table(layer) for layer in range(num_layers)]
        self.slot_tables = [
            ExpertTable.from_blobs(layout, self.pool.address[layer], memory=self.pool.memory)
            for layer, layout in enumerate(layouts)
        ]
        self._host_address = torch.stack([t.address for t in self.host_tables]).to(device)
        self._prompt = Prompt(num_layers, num_experts, device)
        self._told: np.ndarray | None = None  # of a prompt, what the copy thread does not know yet
        self.windows = 0
        self.prefill_tokens = 0
        self._prefill_bytes = 0
        self.cpu_seconds = 0.0  # in the CPU's FFN
        self.waited_seconds = 0.0  # that the GPU had to wait for it, in windows by flags
        self.spans: list[tuple[str, str, float, float]] | None = None  # spac.spans
        self.handoff: HandOff | None = None
        self.by_flags = False  # the layers called meanwhile hand over by flags (spac.handoff)
        # For settle: utility at the start of the window, and its ids.
        self._before: Tensor | None = None
        shape = num_layers, config.max_window, top_k
        self._window_ids = torch.full(shape, -1, dtype=torch.int32, device=device)
        self._width, self._last_width, self._began = 0, 0, 0.0
        self._layer = -1  # that ran last, not by flags
        self._clock = WorkClock()
        self._staging: Staging | None = None
        self._forwarding = threading.Lock()
        self.owner: int | None = None  # the thread that generates: others' forwards are refused
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
        if hidden.device != self.pool.memory.device:
            raise RuntimeError(
                f"spac: hidden rows on {hidden.device}, slots on {self.pool.memory.device}: the "
                "model was moved while attached; call spac.detach(model), then attach again"
            )
        mine = self.owner in (None, threading.get_ident())
        if not mine or not self._forwarding.acquire(blocking=False):
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
        elif layer == 0 or layer != self._layer + 1:  # another forward has come between
            self._learn()  # before the first change is published
        self._layer = layer
        self.pool.publish(layer)
        if prefill:
            return self._prefill(layer, hidden, ids, weights)
        gpu_ids, cpu_ids, table = self._split(layer, ids)
        if self.pool.complete(layer):
            return self._on_gpu(layer, (hidden, gpu_ids, weights), table, hidden.dtype)
        if self._staging is not None:
            self._staging.send(hidden, cpu_ids, weights)
        partial = self._on_gpu(layer, (hidden, gpu_ids, weights), table)
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

    def _split(
        self, layer: int, ids: Tensor, chained: bool = False
    ) -> tuple[Tensor, Tensor, ExpertTable]:
        """ids [T, k] for the GPU and for the CPU, -1 elsewhere, and where the GPU finds experts,
        once `pull.start` is called; the utility moves on. chained: as of `ops.split_window`."""
        if self.config.rejected_weight < 1:
            self._window_ids[layer, : ids.shape[0]] = ids
            chained = False  # a copy may be no kernel, and only kernels are chained
        state = self.utility[layer], self.bounds[layer], self.counters[layer]
        address, most = self.pool.address[layer], self.config.max_utility
        table = self.slot_tables[layer]
        if self.streams is None:
            resident_ids, cpu_ids, counts, _, _ = ops.verify(ids, address, *state, most)
            self.frequency[layer] += counts
            return resident_ids, cpu_ids, table
        places = self.pull.choose(layer)
        address, cpu_ids = ops.split_window(
            ids,
            address,
            self._host_address[layer],
            *state,
            self.frequency[layer],
            self.streams,
            self.streamed[layer],
            most,
            places,
            chained,
        )
        owner = table.owner, self.store
        return ids, cpu_ids, replace(table, address=address, owner=owner, places=places)

    def _on_gpu(
        self, layer: int, rows: Rows, table: ExpertTable, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """[T, H] of the experts in slots and of those that begin to cross the link now."""
        self.pull.start(layer)
        total = ops.expert_ffn_table(*rows, table, dtype)
        self.pull.finish()
        return total

    def _handed(
        self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor, handoff: HandOff
    ) -> Tensor:
        # Slot changes were published before the window, and its first kernel waited for them.
        gpu_ids, cpu_ids, table = self._split(layer, ids, chained=True)
        if self._everything:
            total = self._on_gpu(layer, (hidden, gpu_ids, weights), table, hidden.dtype)
        else:
            # First, since its fence would take 25 us longer beside the link's kernel.
            handoff.send(layer, hidden, cpu_ids, weights)
            partial = self._on_gpu(layer, (hidden, gpu_ids, weights), table)
            total = handoff.join(layer, partial, cpu_ids, hidden.dtype)
        return total

    def _on_cpu(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        start = time.perf_counter()
        rows = ops.expert_ffn_table(hidden, ids, weights, self.host_tables[layer])
        self.cpu_seconds += time.perf_counter() - start
        self.note("cpu", f"layer {layer}", start)
        return rows

    def note(self, track: str, name: str, start: float) -> None:
        """For `spac.spans`: what began at `start` (time.perf_counter) has ended now."""
        if (spans := self.spans) is not None:  # once: the copy thread calls this as well
            spans.append((track, name, start, time.perf_counter()))

    # The forward by flags (spac.target): between `begin_window` and `check` the host program
    # does nothing for a layer, so that a CUDA graph can hold all of them.

    def open_handoff(self, dtype: torch.dtype) -> None:
        """Start the worker that answers the windows, if it does not run."""
        if self.handoff is None:
            sizes = self.config.max_window, self.top_k, dtype
            self.handoff = HandOff(self.host_tables, *sizes, self._state.waited)

    def begin_window(self, width: int) -> None:
        """Before a forward by flags over `width` tokens: every layer's slot changes, the bell."""
        assert self.handoff is not None
        if width > self.config.max_window:
            raise ValueError(f"width: at most max_window={self.config.max_window}, got {width}")
        self._layer = -1
        self._begin_window(width)
        if self.pool.changed:
            self.drafts.learn()
            self.pool.publish()
        if not self._everything:
            self.handoff.begin(width)

    def check(self) -> None:
        """After a window by flags: RuntimeError if the CPU side or the link failed."""
        self.pull.check()
        if self.handoff is None:
            return
        self.handoff.check()
        times = self._clock.times = self.handoff.take_times()
        self.cpu_seconds += float((times[:, 1] - times[:, 0]).sum())
        if self.spans is not None:
            self.spans += [("cpu", f"layer {i}", *t) for i, t in enumerate(times.tolist()) if t[0]]

    def save(self) -> tuple[int, Tensor]:
        """What a window changes, for `load`."""
        return self.windows, self._state.memory.clone()

    def load(self, saved: tuple[int, Tensor]) -> None:
        """Undo what windows changed since `save`."""
        self.windows, memory = saved
        self._learn()  # what has changed places stays where it is
        self._clock.times = None
        self._state.memory.copy_(memory)
        self._state.exchanged.fill_(-1)

    @property
    def streamed_bytes(self) -> int:
        """What the GPU read of experts in host memory: in prefill, and of windows' missing ones."""
        blob = self.store.layouts[0].blob_bytes
        prefill = 0 if self.prefill is None else self.prefill.copied
        return self._prefill_bytes + prefill + blob * int(self.streamed.sum())

    def _prefill(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if layer == 0:
            self.prefill_tokens += hidden.shape[0]
        self._prompt.add(layer, ids)
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
        if (error := self.copier.error) is not None:
            raise RuntimeError(f"spac: the copy thread stopped: {error}") from error
        self._last_width, self._width = self._width, width
        self.windows += 1
        self._began = time.perf_counter()
        self.pull.resume(self.pool)
        if self.copier.is_alive():
            self.drafts.end()  # before anything else crosses the link, behind the draft's copies
            prompt = self._prompt.take(width)
            self._told = self._told if prompt is None else prompt
        if self.control.split is not None:
            self._streams.follow(self.control.split.streams)
        self._bounds.follow(self.control.bounds)
        if self.control.value is not None:
            self.pull.value.follow(self.control.value)
        if self.config.rejected_weight < 1:
            self._before = self.utility.clone()

    def _learn(self) -> None:
        """Let the pool follow what all windows so far did by themselves to the slots."""
        self.pull.resume(self.pool)
        self.drafts.catch_up()

    def launched(self) -> None:
        """The window is launched: now the host learns what the one before did, and the copy thread
        may have its turn; not before, because both need Python's lock."""
        state = self.drafts.take()
        if state is not None and self.copier.is_alive():
            buffers = state.utility.numpy(), state.frequency.numpy()
            work = self._clock.work(self._last_width, state)
            if work is not None:
                self.waited_seconds += float(work.waited.sum())
            self.copier.submit(Snapshot(self.windows, self._began, *buffers, self._told, work))
            self._told = None

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
        if self._cuda:  # Ctrl-C may have left a window, which needs its answers
            torch.cuda.synchronize(self.device)
        if self.handoff is not None:
            self.handoff.close()
        _open.discard(self)
