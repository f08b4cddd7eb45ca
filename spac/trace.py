"""Routing traces: which experts a model chose for every token, in one npz file.

The array has the shape of vLLM's returned routed experts, [tokens, layers, k], so a trace made by
one is read by the other.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_BYTES = 8 << 30  # of a trace file unpacked; a small file can unpack to any size


def _integers(name: str, a: Any, dtypes: tuple[str, ...], ndim: int) -> None:
    if not isinstance(a, np.ndarray) or a.dtype.name not in dtypes or a.ndim != ndim:
        found = f"{a.dtype} {a.shape}" if isinstance(a, np.ndarray) else type(a).__name__
        raise ValueError(
            f"{name}: needed {' or '.join(dtypes)} with {ndim} dimensions, got {found}"
        )


@dataclass(frozen=True, eq=False)
class Trace:
    """Chosen experts of consecutive tokens, and optionally the verify windows they came in.

    A ValueError names the field that is wrong, what it holds and what is needed.
    """

    expert_ids: NDArray[Any]  # uint8 or int16 [tokens, layers, k], 0..num_experts-1
    num_experts: int
    boundaries: NDArray[np.int64] | None = None  # [N + 1] token offsets, 0 .. tokens, increasing
    accepted: NDArray[np.int64] | None = None  # [N] drafted tokens accepted in each window
    model: str = ""

    def __post_init__(self) -> None:
        _integers("expert_ids", self.expert_ids, ("uint8", "int16"), 3)
        if self.num_experts < 1:
            raise ValueError(f"num_experts: needed at least 1, got {self.num_experts}")
        if self.num_experts > 1 << 15:
            raise ValueError(f"num_experts: needed at most {1 << 15}, got {self.num_experts}")
        if self.expert_ids.size == 0:
            raise ValueError(f"expert_ids: needed at least one id, got shape {self.shape}")
        low, high = int(self.expert_ids.min()), int(self.expert_ids.max())
        if low < 0 or high >= self.num_experts:
            raise ValueError(
                f"expert_ids: needed ids in 0..{self.num_experts - 1}, got {low}..{high}"
            )
        if self.boundaries is not None:
            _integers("boundaries", self.boundaries, ("int64",), 1)
            b = self.boundaries
            if b.size < 2 or b[0] != 0 or b[-1] != self.shape[0] or (np.diff(b) < 1).any():
                raise ValueError(
                    f"boundaries: needed increasing offsets from 0 to {self.shape[0]} tokens,"
                    f" got {b.size} values from {b[:1].tolist()} to {b[-1:].tolist()}"
                )
        if self.accepted is not None:
            if self.boundaries is None:
                raise ValueError("accepted: needs boundaries, got none")
            _integers("accepted", self.accepted, ("int64",), 1)
            size = np.diff(self.boundaries)
            if self.accepted.shape != size.shape:
                raise ValueError(f"accepted: needed {size.size} windows, got {self.accepted.size}")
            if (self.accepted < 0).any() or (self.accepted >= size).any():
                raise ValueError("accepted: needed 0..W-1 tokens in a window of W, got others")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(tokens, layers, k)."""
        tokens, layers, k = self.expert_ids.shape
        return tokens, layers, k

    def check_model(self, num_layers: int, num_experts: int, k: int) -> None:
        """ValueError unless the trace has these MoE layers, experts and choices per token."""
        have = (self.shape[1], self.num_experts, self.shape[2])
        if have != (num_layers, num_experts, k):
            name = f" of {self.model}" if self.model else ""
            raise ValueError(
                f"trace{name} has {have[0]} layers x {have[1]} experts, top-{have[2]};"
                f" the model has {num_layers} x {num_experts}, top-{k}"
            )

    def text(self) -> Trace:
        """The trace without rows of rejected tokens and without windows; itself if no `accepted`
        tells which they are."""
        if self.boundaries is None or self.accepted is None:
            return self
        sizes, starts = np.diff(self.boundaries), self.boundaries[:-1]
        row = np.arange(self.shape[0]) - np.repeat(starts, sizes)
        kept = self.expert_ids[row <= np.repeat(self.accepted, sizes)]
        return Trace(kept, self.num_experts, model=self.model)

    def split(self, tokens: int) -> tuple[Trace, Trace]:
        """The first `tokens` tokens and those after them, without windows."""
        ids = self.expert_ids
        head, tail = (
            Trace(part, self.num_experts, model=self.model) for part in (ids[:tokens], ids[tokens:])
        )
        return head, tail

    def counts(self) -> NDArray[np.int64]:
        """How often each expert was chosen, [layers, experts]."""
        layers = range(self.shape[1])
        rows = [
            np.bincount(self.expert_ids[:, i].ravel(), minlength=self.num_experts) for i in layers
        ]
        return np.stack(rows)

    def windows(self, size: int | None = None) -> Iterator[NDArray[Any]]:
        """Yield ids [W, layers, k]: windows of `size` tokens, the last possibly shorter.

        Without `size`, the recorded windows; one token each if none were recorded.
        """
        if size is not None and size < 1:
            raise ValueError(f"size: needed at least 1 token in a window, got {size}")
        if size is None and self.boundaries is not None:
            edges = self.boundaries.tolist()
        else:
            edges = [*range(0, self.shape[0], size or 1), self.shape[0]]
        for start, stop in zip(edges, edges[1:], strict=False):
            yield self.expert_ids[start:stop]


def save_trace(path: str | os.PathLike[str], trace: Trace) -> None:
    """Write `trace` as a compressed npz of plain arrays."""
    arrays: dict[str, Any] = {
        "expert_ids": trace.expert_ids,
        "num_experts": np.int64(trace.num_experts),
    }
    if trace.boundaries is not None:
        arrays["boundaries"] = trace.boundaries
    if trace.accepted is not None:
        arrays["accepted"] = trace.accepted
    if trace.model:
        arrays["model"] = np.array(trace.model)
    with open(path, "wb") as f:  # a file object, so that numpy appends no suffix
        np.savez_compressed(f, **arrays)


def load_trace(path: str | os.PathLike[str]) -> Trace:
    """Read an npz trace. Whatever is wrong with the file is one line of ValueError that names it.

    A path that does not exist stays a FileNotFoundError. Pickled arrays are refused.
    """
    try:
        with open(path, "rb") as f:
            if not zipfile.is_zipfile(f):  # numpy would advise to unpickle it
                raise ValueError("needed an npz archive")
            f.seek(0)
            archive = np.load(f, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("needed an npz archive, got a single array")
            size = sum(entry.file_size for entry in archive.zip.infolist())
            if size > MAX_BYTES:
                raise ValueError(f"unpacked it would be {size} bytes, {MAX_BYTES} are allowed")
            arrays = {name: archive[name] for name in archive.files}
            if odd := [n for n, a in arrays.items() if not isinstance(a, np.ndarray)]:
                raise ValueError(f"needed arrays, got something else in {odd}")
    except FileNotFoundError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, KeyError,
            RuntimeError, MemoryError) as e:  # fmt: skip
        reason = str(e).strip().splitlines() or [type(e).__name__]
        raise ValueError(f"{path}: not a readable trace (npz): {reason[0]}") from None
    known = {"expert_ids", "num_experts", "boundaries", "accepted", "model"}
    for name in ("expert_ids", "num_experts"):
        if name not in arrays:
            raise ValueError(f"{path}: needed an array {name!r}, got {sorted(arrays)}")
    if unknown := sorted(set(arrays) - known):
        raise ValueError(f"{path}: unknown arrays {unknown}; a trace has {sorted(known)}")
    experts, model = arrays["num_experts"], arrays.get("model", np.array(""))
    if experts.ndim or experts.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: num_experts: needed one integer, got {experts.dtype} {experts.shape}"
        )
    if model.ndim or model.dtype.kind != "U":
        raise ValueError(f"{path}: model: needed one string, got {model.dtype} {model.shape}")
    try:
        return Trace(
            expert_ids=arrays["expert_ids"],
            num_experts=int(experts),
            boundaries=arrays.get("boundaries"),
            accepted=arrays.get("accepted"),
            model=str(model),
        )
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
