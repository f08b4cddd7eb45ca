"""Who runs the experts of a full-size model: spac, and the ways of others over the same weights.

All have `forward(layer, hidden [T, H], ids [T, k], weights [T, k])` and count the same things.
They share spac's kernels, host store and pinned copies, so that only the strategy differs.
"""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import grouped_mm_experts_forward

from spac import ops
from spac.config import SpacConfig
from spac.cost import CostModel
from spac.engine import COUNTERS, Engine
from spac.experts import find_experts
from spac.layout import ExpertLayout, ExpertTable
from spac.pool import SlotPool
from spac.split import Split
from spac.store import HostStore, blob_views

Copy = Callable[[Any, Any, Any], None]  # layer, expert and slot, of one or of several


@dataclass
class Counts:
    """What a provider did; figures are differences of two."""

    pairs: int = 0
    resident_pairs: int = 0
    gpu_experts: int = 0  # distinct experts of a layer and window that the GPU computed
    cpu_experts: int = 0
    moved: int = 0  # bytes over the link
    copied: int = 0  # of them, by the copy thread
    in_drafts: int = 0  # of these, beside a draft, not beside a window
    cpu_seconds: float = 0.0
    waited_seconds: float = 0.0  # by the GPU, for the CPU's answer

    def __sub__(self, other: Counts) -> Counts:
        return Counts(**{name: value - vars(other)[name] for name, value in vars(self).items()})


class Provider:
    """Base: nothing to do around a window or at the end of a run."""

    counts: Counts
    static = False  # may be captured in a CUDA graph
    depth: int | None = None  # layer l has the weights of layer l % depth
    slow = False  # a few windows must do
    engine: Engine | None = None

    @property
    def split(self) -> Split | None:
        """What the engine found the CPU and the link to take in its windows."""
        return self.engine.control.split if self.engine is not None else None

    def drafting(self, tokens: int) -> None:
        """The last window is over, and a draft model runs for so many tokens next."""

    def launched(self) -> None:
        """Its first step is on its way."""

    def begin(self, ids: Tensor) -> None:
        """A window is to come, ids [L, W, k]."""

    def forward(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError

    def settle(self, accepted: Tensor) -> None:
        """A window is over: its rows 0..accepted were kept."""

    def read(self) -> Counts:
        return Counts(**vars(self.counts))

    def close(self) -> None:
        pass


class EngineProvider(Provider):
    """spac's engine; with policy "static" and a hot set this is Fiddler's split."""

    def __init__(
        self,
        store: HostStore,
        slots: int,
        top_k: int,
        device: torch.device,
        config: SpacConfig,
        costs: CostModel,
        hot: np.ndarray | None = None,
        link: float | None = None,
    ) -> None:
        self.engine: Engine = Engine(store, slots, top_k, device, config, costs, first=hot)
        copier = self.engine.copier
        self._filled = copier.bytes_copied
        if link is not None:
            slow = throttled(copier._copy, store.layouts[0].blob_bytes / link)
            copier._copy = slow  # type: ignore
        self.engine.start()

    def drafting(self, tokens: int) -> None:
        self.engine.drafts.begin(tokens)

    def launched(self) -> None:
        self.engine.drafts.launched()

    def forward(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.engine.forward(layer, hidden, ids, weights)

    def settle(self, accepted: Tensor) -> None:
        self.engine.settle(accepted)

    def read(self) -> Counts:
        engine = self.engine
        totals = dict(zip(COUNTERS, engine.counters.sum(0).tolist(), strict=True))
        resident, streamed = totals["resident_experts"], int(engine.streamed.sum())
        copied = engine.copier.bytes_copied - self._filled
        return Counts(
            pairs=totals["pairs"],
            resident_pairs=totals["resident_pairs"],
            gpu_experts=resident + streamed,
            cpu_experts=totals["experts"] - resident - streamed,
            moved=copied + engine.streamed_bytes,
            copied=copied,
            in_drafts=engine.copier.bytes_in_drafts,
            cpu_seconds=engine.cpu_seconds,
            waited_seconds=engine.waited_seconds,
        )

    def close(self) -> None:
        self.engine.close()


class OnDemand(Provider):
    """Every expert runs on the GPU; what is missing is fetched first (mixtral-offloading).

    Each layer keeps its `slots // layers` least recently used experts; none: plain streaming. An
    area for one layer's experts takes what the cache cannot hold.
    """

    def __init__(
        self, store: HostStore, slots: int, device: torch.device, link: float | None = None
    ) -> None:
        layouts = store.layouts
        layers, self.experts = len(layouts), layouts[0].num_experts
        self.store, self.each, self.counts = store, slots // layers, Counts()
        self.pool = SlotPool(layouts, layers * self.each + self.experts, device)
        self.tables = [
            ExpertTable.from_blobs(layout, self.pool.address[layer], owner=self.pool.memory)
            for layer, layout in enumerate(layouts)
        ]
        self.cached: list[OrderedDict[int, int]] = [OrderedDict() for _ in layouts]  # expert: slot
        self.free = [[layer * self.each + i for i in range(self.each)] for layer in range(layers)]
        self._row = torch.zeros(self.experts, dtype=torch.int64)
        if device.type == "cuda":
            self._row = self._row.pin_memory()
        self._fetch: Copy = self._copy
        if link is not None:
            self._fetch = throttled(self._copy, layouts[0].blob_bytes / link)

    def forward(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        chosen = ids.cpu().numpy()  # waits for the stream: the row below may be written again
        used, pairs = np.unique(chosen, return_counts=True)
        cached, slots, spare = self.cached[layer], {}, len(self.cached) * self.each
        hits = [int(e) in cached for e in used]
        self.counts.pairs += int(pairs.sum())
        self.counts.resident_pairs += int(pairs[hits].sum())
        self.counts.gpu_experts += len(used)
        for expert in used[np.argsort(np.invert(hits), kind="stable")].tolist():
            if expert in cached:
                cached.move_to_end(expert)
                slots[expert] = cached[expert]
                continue
            slot = self._room(layer, slots)
            if slot is None:
                slot, spare = spare, spare + 1
            else:
                cached[expert] = slot
            self._fetch(layer, expert, slot)
            slots[expert] = slot
        row = self._row.zero_()
        base, size = self.pool.memory.data_ptr(), self.pool.slot_bytes
        for expert, slot in slots.items():
            row[expert] = base + slot * size
        self.pool.address[layer].copy_(row, non_blocking=True)
        return ops.expert_ffn_table(hidden, ids, weights, self.tables[layer], hidden.dtype)

    def _room(self, layer: int, needed: dict[int, int]) -> int | None:
        """A slot of the layer's cache: a free one, or that of the least recently used expert."""
        if self.free[layer]:
            return self.free[layer].pop()
        cached = self.cached[layer]
        victim = next(iter(cached), None)
        if victim is None or victim in needed:
            return None
        return cached.pop(victim)

    def _copy(self, layer: int, expert: int, slot: int) -> None:
        blob = self.store.blobs[layer][expert]
        self.pool.memory[slot, : blob.numel()].copy_(blob, non_blocking=True)
        self.counts.moved += blob.numel()


class AllOnCpu(Provider):
    """Attention on the GPU, every expert on the CPU (llama.cpp -ot exps=CPU)."""

    def __init__(self, store: HostStore) -> None:
        self.tables = [store.table(layer) for layer in range(len(store.layouts))]
        self.counts = Counts()

    def forward(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows, chosen, gates = hidden.cpu(), ids.cpu(), weights.float().cpu()
        start = time.perf_counter()
        y = ops.expert_ffn_table(rows, chosen, gates, self.tables[layer], hidden.dtype)
        self.counts.cpu_seconds += time.perf_counter() - start
        self.counts.pairs += chosen.numel()
        self.counts.cpu_experts += len(np.unique(chosen.numpy()))
        return y.to(hidden.device)


class AllResident(Provider):
    """Every expert in GPU memory: the upper bound."""

    static = True

    def __init__(self, store: HostStore, device: torch.device) -> None:
        self.counts = Counts()
        self.memory = [blobs.to(device) for blobs in store.blobs]
        self.tables = []
        for layout, blobs in zip(store.layouts, self.memory, strict=True):
            address = torch.arange(len(blobs), device=device) * blobs.stride(0) + blobs.data_ptr()
            self.tables.append(ExpertTable.from_blobs(layout, address, owner=blobs))
        self._ids: list[Tensor] = []

    def begin(self, ids: Tensor) -> None:
        self._ids += ids

    def forward(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return ops.expert_ffn_table(hidden, ids, weights, self.tables[layer], hidden.dtype)

    def read(self) -> Counts:
        for ids in self._ids:  # counted afterwards: nothing waits for the GPU meanwhile
            self.counts.pairs += ids.numel()
            self.counts.resident_pairs += ids.numel()
            self.counts.gpu_experts += len(ids.unique())
        self._ids.clear()
        return super().read()


def experts_over(module: nn.Module, layout: ExpertLayout, blobs: Tensor) -> nn.Module:
    """transformers' experts `module` with the weights in `blobs`, as views."""
    own, views = copy.copy(module), blob_views(blobs, layout)
    own._parameters = {"gate_up_proj": views["gate_up"], "down_proj": views["down"]}  # type: ignore
    return own


class GroupedMm(AllResident):
    """Every expert in GPU memory, run by transformers' grouped_mm."""

    def __init__(self, model: PreTrainedModel, store: HostStore, device: torch.device) -> None:
        super().__init__(store, device)
        self.layers = [
            experts_over(module, layout, blobs)
            for (_, module), layout, blobs in zip(
                find_experts(model), store.layouts, self.memory, strict=True
            )
        ]

    def forward(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        weights = weights.to(hidden.dtype)
        return grouped_mm_experts_forward(self.layers[layer], hidden, ids.long(), weights)


class Accelerated(Provider):
    """accelerate's `cpu_offload` around transformers' experts: each layer's cross the link whole.

    The weights of two layers, a second copy in host memory, stand for those of all.
    """

    depth = 2
    slow = True

    def __init__(self, model: PreTrainedModel, store: HostStore, device: torch.device) -> None:
        from accelerate import cpu_offload

        self.counts, self.layers = Counts(), []
        for (_, module), layout, blobs in zip(
            find_experts(model)[: self.depth], store.layouts, store.blobs, strict=False
        ):
            own: Any = experts_over(module, layout, blobs)
            own.__dict__.pop("_spac_binding", None)
            own.config = copy.copy(module.config)
            own.config._experts_implementation = "grouped_mm" if device.type == "cuda" else "eager"
            for name, view in own._parameters.items():
                own._parameters[name] = nn.Parameter(view.contiguous(), requires_grad=False)
            self._bytes = sum(p.nbytes for p in own._parameters.values())
            cpu_offload(own, device)
            self.layers.append(own)

    def forward(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        self.counts.pairs += ids.numel()
        self.counts.moved += self._bytes
        self.counts.gpu_experts += len(ids.unique())
        module = self.layers[layer % len(self.layers)]
        return module(hidden, ids.long(), weights.to(hidden.dtype))


def throttled(copy: Copy, seconds: float) -> Copy:
    """`copy`, made to last at least `seconds` an expert: a slower link."""

    def slow(layer: Any, expert: Any, slot: Any) -> None:
        start = time.perf_counter()
        copy(layer, expert, slot)
        while time.perf_counter() - start < seconds * np.size(slot):
            time.sleep(0)

    return slow
