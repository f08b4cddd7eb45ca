"""The figures of decoding at full size, and how they are shown."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from spac.bench.providers import Counts
from spac.bench.roofline import Machine
from spac.split import Split

COLUMNS = ["provider", "slots", "gamma", "tokens/s", "ms/step", "draft ms", "TTFT ms", "coverage"]
COLUMNS += ["GB/token", "copies/step", "GPU busy", "GPU waits", "CPU busy", "PCIe busy"]
COLUMNS += ["of roofline"]
BASELINES = ("lru", "static", "cpu", "stream")


@dataclass
class Figures:
    steps: int
    tokens: int
    seconds: float
    step: float  # median seconds, draft included
    draft: float  # seconds per window
    ttft: float
    counts: Counts
    gpu_busy: float | None
    eager: list[str]  # why a window that could be a CUDA graph was none
    split: Split | None  # what the engine learnt
    error: float  # of sampled layers (full_size_check)


def cells(f: Figures, machine: Machine, blob: int, dense: int) -> list[Any]:
    """COLUMNS from tokens/s on; blob: bytes of an expert, dense: of all that is none."""
    c, verify = f.counts, f.step - f.draft
    sides = {
        "CPU": c.cpu_experts * blob / machine.read,
        "link": (c.moved - c.in_drafts) / machine.link,
        "GPU": (c.gpu_experts * blob + dense * f.steps) / machine.memory,
    }
    return [
        f.tokens / f.seconds,
        f.step * 1e3,
        f.draft * 1e3,
        f.ttft * 1e3,
        c.resident_pairs / max(c.pairs, 1),
        c.moved / f.tokens / 1e9,
        c.copied / blob / f.steps,
        f.gpu_busy,
        c.waited_seconds / f.seconds,
        c.cpu_seconds / f.seconds,
        c.moved / machine.link / f.seconds,
        max(sides.values()) / f.steps / verify,
    ]


def margins(figures: dict[tuple[str, int, int], Figures]) -> list[str]:
    """The paper's two margins, per cache ratio, and the one over the best of all."""
    notes = []
    speed = {key: f.tokens / f.seconds for key, f in figures.items()}
    for slots in dict.fromkeys(s for _, s, _ in speed):
        mine = {g: v for (name, s, g), v in speed.items() if name == "spac" and s == slots}
        if not mine:
            continue
        gamma = max(mine, key=lambda g: mine[g])
        text = f"{slots} slots: spac is fastest at gamma {gamma}"
        others = [(n, g, v) for (n, s, g), v in speed.items() if s == slots and n in BASELINES]
        if others:
            name, length, best = max(others, key=lambda other: other[2])
            text += f", x {mine[gamma] / best:.2f} the best other ({name}, gamma {length})"
        drafted = [(v, n) for n, g, v in others if g]
        plain = [v for _, g, v in others if not g]
        if drafted:
            text += f", x {mine[gamma] / max(drafted)[0]:.2f} the best with SD ({max(drafted)[1]})"
        if plain:
            text += f", x {mine[gamma] / statistics.mean(plain):.2f} the mean without SD"
        notes.append(text)
    return notes
