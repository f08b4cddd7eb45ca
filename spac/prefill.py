"""Experts of a prompt: those that are not on the GPU come through two areas of it, in turn.

While the kernels work on one area, the copy engine fills the other; meanwhile the CPU computes the
experts with the fewest tokens, as many as it can while the others cross the link. What has crossed
can stay: the experts that the prompt chose most take the slots of those that it chose least.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spac import ops
from spac.cost import CostModel
from spac.layout import ExpertLayout, ExpertTable
from spac.pool import SlotPool
from spac.store import HostStore

PREFILL_CHUNK = 2048  # tokens of a prompt that go through the target at once
_AREA_BYTES = 96 << 20


def area_experts(layout: ExpertLayout) -> int:
    """Experts that each of the two areas holds; 0: they are too large for areas at all."""
    return min(layout.num_experts // 8, _AREA_BYTES // layout.blob_bytes)


class Prompt:
    """What the tokens of prompts chose since the last window."""

    def __init__(self, layers: int, experts: int, device: torch.device) -> None:
        self._pairs = torch.zeros(layers, experts, dtype=torch.int64, device=device)
        self._tokens = 0

    def add(self, layer: int, ids: Tensor) -> None:
        """Count the pairs of ids [T, k]; every token comes once to every layer."""
        if layer == 0:
            self._tokens += ids.shape[0]
        valid = (ids >= 0) & (ids < self._pairs.shape[1])
        flat = torch.where(valid, ids, 0).flatten().long()
        self._pairs[layer].scatter_add_(0, flat, valid.flatten().long())

    def take(self, width: int) -> np.ndarray | None:
        """Pairs [L, E] of a window of `width` tokens like these, which are then forgotten."""
        if not self._tokens:
            return None
        pairs = self._pairs.cpu().numpy() * (width / self._tokens)
        self._pairs.zero_()
        self._tokens = 0
        return pairs


class Prefill:
    """For forwards over many tokens. Without a GPU the areas are host memory (tests)."""

    def __init__(self, store: HostStore, device: torch.device, costs: CostModel) -> None:
        self.store, self.device, self.costs = store, device, costs
        self.size = area_experts(store.layouts[0])
        blob = max(layout.blob_bytes for layout in store.layouts)
        self._areas = torch.empty(2, self.size, blob, dtype=torch.uint8, device=device)
        self._host_tables = [store.table(layer) for layer in range(len(store.layouts))]
        self._pairs = np.zeros((len(store.layouts), store.layouts[0].num_experts), dtype=np.int64)
        self.room = self._areas.flatten(0, 1)  # for who needs it between two prompts
        self._next = 0
        self.copied = 0  # bytes
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._copies is not None:
            self._filled = [torch.cuda.Event() for _ in range(2)]
            self._free = [torch.cuda.Event() for _ in range(2)]

    def forward(
        self,
        layer: int,
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        slots: ExpertTable,
        pool: SlotPool | None = None,
    ) -> Tensor:
        """The experts of one layer: hidden [T, H], ids and weights [T, k]; fp32 [T, H].

        pool: of `slots`, to keep in it what the prompts so far chose most.
        """
        rows, chosen, gates = self._on_host(hidden), self._on_host(ids), self._on_host(weights)
        if self._copies is not None:
            torch.cuda.current_stream().synchronize()
        flat = chosen.numpy().ravel()
        known = self._pairs.shape[1]
        counts = np.bincount(flat[(flat >= 0) & (flat < known)], minlength=known)
        self._pairs[layer] += counts
        on_link, on_cpu = self._share(counts, slots.address.cpu().numpy())
        total = ops.expert_ffn_table(hidden, ids, weights, slots)
        for begin in range(0, len(on_link), self.size):
            experts = on_link[begin : begin + self.size]
            table = self._fetch(layer, experts)
            total += ops.expert_ffn_table(hidden, ids, weights, table)
            if pool is not None:
                self._keep(layer, experts, pool)
            if self._copies is not None:
                self._free[self._next].record()
            self._next = 1 - self._next
        if len(on_cpu):
            theirs = torch.isin(chosen, torch.from_numpy(on_cpu))
            pairs = torch.where(theirs, chosen, -1), gates
            total += ops.expert_ffn_table(rows, *pairs, self._host_tables[layer]).to(self.device)
        return total

    def _keep(self, layer: int, experts: np.ndarray, pool: SlotPool) -> None:
        """The experts in the area, most pairs first, take the slots of the layer's residents with
        the fewest, as long as they have more."""
        pairs = self._pairs[layer]
        held = np.flatnonzero(pool.settled(layer))
        least = held[np.argsort(pairs[held], kind="stable")][: len(experts)]
        places = np.argsort(-pairs[experts], kind="stable")
        places = places[~pool.held[layer, experts[places]]]
        order = experts[places]
        stay = int((pairs[order][: len(least)] > pairs[least][: len(order)]).sum())
        size = self.store.blobs[layer].shape[1]
        area = self._areas[self._next]
        pool.exchange(
            layer,
            least[:stay].tolist(),
            order[:stay].tolist(),
            [area[p, :size] for p in places[:stay]],
        )

    def _on_host(self, tensor: Tensor) -> Tensor:
        """A copy in host memory, complete when the stream has come here."""
        host = torch.empty_like(tensor, device="cpu", pin_memory=self._copies is not None)
        return host.copy_(tensor, non_blocking=True)

    def _share(self, counts: np.ndarray, address: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The missing experts of counts [E], for the link (most pairs first) and for the CPU."""
        missing = np.flatnonzero((counts > 0) & (address == 0))
        missing = missing[np.argsort(-counts[missing], kind="stable")]
        few = counts[missing][::-1].cumsum()
        n = np.arange(len(missing) + 1)
        cpu = self.costs.cpu(n, np.concatenate([[0], few]))
        link = self.costs.h2d(len(missing) - n)
        left = len(missing) - int(np.maximum(cpu, link).argmin())
        return missing[:left], missing[left:]

    def _fetch(self, layer: int, experts: np.ndarray) -> ExpertTable:
        """Copy experts into the next area, once it is free, for kernels launched from here."""
        area, layout = self._areas[self._next], self.store.layouts[layer]
        rows = np.zeros(layout.num_experts, dtype=np.int64)
        rows[experts] = area.data_ptr() + np.arange(len(experts)) * area.stride(0)
        address = torch.from_numpy(rows)
        blobs = self.store.blobs[layer]
        size = blobs.shape[1]
        self.copied += len(experts) * size
        if self._copies is None:
            for place, expert in enumerate(experts.tolist()):
                area[place, :size].copy_(blobs[expert])
            return ExpertTable.from_blobs(layout, address, memory=area)
        address = address.pin_memory().to(self.device, non_blocking=True)
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._free[self._next])
            for place, expert in enumerate(experts.tolist()):
                area[place, :size].copy_(blobs[expert], non_blocking=True)
            self._filled[self._next].record()
        torch.cuda.current_stream().wait_event(self._filled[self._next])
        return ExpertTable.from_blobs(layout, address, memory=area)
