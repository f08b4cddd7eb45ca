"""Tiles of the expert FFN, tried on this GPU: what `select_config` is made of."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spac.bench.arguments import positive
from spac.bench.kernels import (
    DTYPES,
    SHAPES,
    Problem,
    graph_seconds,
    make_params,
    make_problem,
    relative_error,
)
from spac.bench.report import Table, WrongResult
from spac.kernels.config import FFNConfig, Tile, device_of, select_config
from spac.kernels.expert_ffn import choose, expert_ffn
from spac.layout import ExpertLayout
from spac.progress import progress

NAME = "tune"
HELP = "tiles of the expert FFN on this GPU: select_config's choice beside the best one found"
COLUMNS = ["tokens", "selected us", "best us", "ratio", "path", "gate-up", "down", "tried"]

# The tiles to try for gate-up, then for down with the best gate-up: few tokens, then by rows.
TOKENS = (
    [Tile(16, n, k, w, s) for n, k, w, s in (
        (32, 256, 4, 2), (32, 64, 4, 6), (32, 256, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3),
        (16, 256, 4, 3), (16, 128, 4, 4), (16, 128, 2, 4), (32, 128, 2, 4))],
    [Tile(16, n, k, w, s) for n, k, w, s in (
        (32, 128, 4, 4), (32, 256, 4, 3), (64, 128, 4, 3), (64, 64, 4, 6), (64, 256, 4, 3),
        (128, 64, 4, 4), (16, 256, 4, 3), (32, 128, 2, 4))],
)  # fmt: skip
FEW = (
    [Tile(m, n, k, w, s) for m, n, k, w, s in (
        (16, 16, 256, 4, 4), (16, 32, 128, 4, 3), (16, 32, 128, 4, 6), (16, 32, 256, 4, 3),
        (16, 64, 128, 4, 3), (16, 64, 64, 4, 5), (32, 32, 128, 4, 4), (32, 64, 64, 4, 4))],
    [Tile(16, n, k, w, s) for n, k, w, s in (
        (32, 128, 4, 4), (32, 256, 4, 3), (64, 128, 4, 3), (64, 128, 4, 6), (128, 64, 4, 4),
        (128, 128, 4, 3))],
)  # fmt: skip
SOME = (
    [Tile(m, n, k, w, s) for m, n, k, w, s in (
        (16, 64, 128, 4, 3), (32, 64, 128, 4, 3), (32, 64, 64, 4, 4), (32, 128, 64, 4, 3),
        (64, 64, 64, 4, 3), (64, 128, 64, 4, 3), (64, 128, 64, 8, 3), (64, 128, 64, 8, 4))],
    [Tile(16, n, k, w, s) for n, k, w, s in (
        (64, 128, 4, 3), (128, 64, 4, 4), (128, 128, 4, 3), (256, 64, 4, 3), (256, 64, 8, 3))],
)  # fmt: skip
MANY = (
    [Tile(m, n, k, w, s) for m, n, k, w, s in (
        (128, 128, 64, 8, 4), (128, 128, 32, 8, 5), (128, 64, 64, 8, 4), (128, 64, 64, 4, 4),
        (64, 128, 64, 4, 4), (64, 64, 64, 4, 4))],
    [Tile(16, n, k, w, s) for n, k, w, s in (
        (256, 64, 8, 4), (256, 32, 8, 6), (128, 64, 8, 4), (128, 64, 4, 4), (128, 32, 4, 6))],
)  # fmt: skip
DESCRIPTORS = (
    [Tile(m, n, k, w, s, small) for m, n, k, w, s, small in (
        (128, 128, 64, 8, 4, 32), (128, 128, 64, 8, 4, 64), (128, 128, 64, 8, 3, 32),
        (128, 64, 64, 8, 3, 32), (64, 64, 64, 4, 4, 16), (64, 128, 64, 8, 4, 16))],
    [Tile(16, n, k, w, s, small) for n, k, w, s, small in (
        (256, 64, 8, 4, 32), (256, 64, 8, 4, 64), (128, 64, 8, 3, 32), (128, 64, 4, 3, 32),
        (128, 64, 4, 4, 16))],
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--tokens", type=positive, nargs="+",
                        default=[1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096])  # fmt: skip
    parser.add_argument("--seconds", type=float, default=15.0, help="per number of tokens")


def run(args: argparse.Namespace) -> Table:
    """Coordinate descent for each number of tokens; raises if the best one's result is wrong."""
    if not torch.cuda.is_available():
        raise ValueError("tune: needs a CUDA GPU, none is here")
    E, H, inter, top_k, options = SHAPES[args.shape]
    layout = ExpertLayout(E, H, inter, DTYPES[args.dtype], **options)
    params = make_params(layout, "cuda")
    rows = []
    for tokens in progress(args.tokens, NAME):
        p = make_problem(layout, params, tokens, top_k, "cuda")
        x, ids = p.x[0], p.ids[0]
        selected, other = choose(x, ids, p.table), choose(x, ids, p.table, "grouped")
        if other.path == selected.path:
            other = select_config(tokens, top_k, layout, device_of(x.device), "grouped")
        found = descend(selected, other, tokens * top_k / E, p, args.seconds)
        best, times = found[0], found[1]
        error = relative_error(_call(best, p, 0), p)
        if not error < 2e-2:
            raise WrongResult(f"{tokens} tokens, {brief(best)}: error {error:.1e}")
        default, least = times[selected], times[best]
        rows.append(
            [tokens, default * 1e6, least * 1e6, default / least, best.path]
            + [brief(best.gate_up), brief(best.down), len(times)]
        )
    notes = [f"{args.shape}, {args.dtype}; tiles as MxNxK, warps, stages; graph replay, medians"]
    return Table(COLUMNS, rows, f"tiles, {args.shape}", notes)


def _candidates(path: str, rows: float) -> tuple[list[Tile], list[Tile]]:
    """Tiles for gate-up and down, at `rows` rows of an expert."""
    if path != "grouped":
        return TOKENS if path == "tokens" else DESCRIPTORS
    return FEW if rows <= 6 else SOME if rows <= 96 else MANY


def _variants(other: FFNConfig, rows: float) -> list[Callable[[FFNConfig], Iterator[FFNConfig]]]:
    """Steps of the descent; each makes configurations out of the best one so far."""

    def down(best: FFNConfig) -> Iterator[FFNConfig]:
        for tile in _candidates(best.path, rows)[1]:
            yield replace(best, down=replace(tile, block_m=best.gate_up.block_m))

    return [
        lambda best: iter([other]),
        lambda best: (replace(best, gate_up=t) for t in _candidates(best.path, rows)[0]),
        down,
    ]


def descend(
    selected: FFNConfig,
    other: FFNConfig,
    rows: float,
    p: Problem,
    seconds: float,
) -> tuple[FFNConfig, dict[FFNConfig, float]]:
    """The fastest configuration found within `seconds`, and the time of every one tried."""
    times = {selected: _seconds(selected, p)}
    best = selected
    for i, variants in enumerate(_variants(other, rows)):
        deadline = time.perf_counter() + seconds * (0.1, 0.5, 0.4)[i]
        for config in variants(best):
            if config in times or time.perf_counter() > deadline:
                continue
            times[config] = _seconds(config, p)
        best = min(times, key=lambda c: times[c])
    return best, times


def _call(config: FFNConfig, p: Problem, r: int) -> Tensor:
    return expert_ffn(p.x[r], p.ids[r], p.weights[r], p.table, None, config)


def _seconds(config: FFNConfig, p: Problem) -> float:
    """Seconds of one call; infinite if the tiles do not fit the GPU."""
    try:
        return graph_seconds(partial(_call, config, p), 0.05)
    except Exception as error:  # Triton's errors have no common class
        if "out of resource" not in str(error) and "shared memory" not in str(error):
            raise
        torch.cuda.synchronize()
        return float("inf")


def brief(t: Any) -> str:
    if isinstance(t, FFNConfig):
        return f"{t.path} {brief(t.gate_up)} {brief(t.down)}"
    return f"{t.block_m}x{t.block_n}x{t.block_k} {t.num_warps}w {t.num_stages}s"
