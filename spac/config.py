"""User settings of an attached model, and sizes written by people ("8GiB")."""

from __future__ import annotations

import re
from dataclasses import dataclass

from spac.layout import FORMS, GROUPS

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {"ki": 1024, "mi": 1024**2, "gi": 1024**3, "ti": 1024**4}
POLICIES = ("spac", "spac-reference", "lru", "lfu", "lfru", "hybri", "static")


def parse_bytes(size: int | str) -> int:
    """Bytes of `size`: an integer, or text such as "8GiB", "500 MB" or "1.5g"."""
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise ValueError(f'size: expected bytes or text such as "8GiB", got {size!r}')
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", size.lower())
        if match is None or match[2] == "i":
            raise ValueError(f'size: expected bytes or text such as "8GiB", got {size!r}')
        size = int(float(match[1]) * _UNITS[match[2]])
    if size < 0:
        raise ValueError(f"size: must not be negative, got {size}")
    return size


def format_bytes(size: float) -> str:
    """`size` bytes for people, in binary units: 8.0 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


@dataclass(frozen=True)
class SpacConfig:
    """Settings of `spac.attach`; the defaults are what the docs measure."""

    policy: str = "spac"  # spac.policy; "static" keeps the first fill, "spac-reference": the paper
    max_length: int = 4096  # tokens of KV cache that the budget pays for
    max_window: int = 32  # a forward over more tokens than this is prefill
    max_utility: int = 5  # K of the paper
    rejected_weight: float = 1.0  # what a rejected token's pairs count; 1 = the paper
    rebalance_every: int = 16  # windows between two integer programmes
    # Experts that may be fetched in one window, at most; after a prompt as many as it asks for.
    max_copies: int = 64
    # Windows over a static KV cache, as CUDA graphs (spac.target). None: on a GPU; True: on a
    # CPU too, the same path without graphs; False: transformers' eager forward.
    static_windows: bool | None = None
    # Compile norms, rotary embedding and dense MLPs when a window is captured (spac.fuse), which
    # takes half a minute the first time. None: for models of 16 layers and more.
    fuse_windows: bool | None = None
    # Beside the CPU, the GPU reads some of a window's missing experts from host memory itself, so
    # that both end together. None: on a GPU; True: on a CPU too; False: the CPU computes them all.
    stream_missing: bool | None = None
    # While a draft model runs, experts that the last window missed cross the idle link, as many as
    # its time carries (spac.idle); only where windows stream, see stream_missing.
    draft_copies: bool = True
    # Of experts in the host store and in slots: "float" as in the checkpoint; "int8" or "int4" are
    # quantised by attach (spac.quantize), which changes answers.
    weights: str = "float"
    int4_group: int = 32  # weights that share a scale: 32 or 128
    # Of the CPU's FFN, for the whole process. None: beside a GPU every core but one, without one
    # torch's number, which OMP_NUM_THREADS sets.
    cpu_threads: int | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy: expected one of {POLICIES}, got {self.policy!r}")
        if self.weights not in FORMS:
            raise ValueError(f"weights: expected one of {FORMS}, got {self.weights!r}")
        if self.int4_group not in GROUPS:
            raise ValueError(f"int4_group: expected one of {GROUPS}, got {self.int4_group}")
        if not 0 <= self.rejected_weight <= 1:
            raise ValueError(f"rejected_weight: expected 0..1, got {self.rejected_weight}")
        for name in ("max_length", "max_window", "max_utility", "rebalance_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.cpu_threads is not None and not 1 <= self.cpu_threads <= 1024:
            raise ValueError(f"cpu_threads: expected 1..1024 or None, got {self.cpu_threads}")
        if self.max_copies < 0:
            raise ValueError(f"max_copies: must not be negative, got {self.max_copies}")
