"""Candidate tiles of the expert FFN, timed on this GPU: what select_config is made from."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spac.bench.kernels import Problem, graph_seconds, make_problem
from spac.kernels.config import FFNConfig, Tile, device_of, select_config
from spac.kernels.expert_ffn import expert_ffn
from spac.layout import ExpertLayout

# By number of tokens: the tiles to try for gate-up, then for down with the best gate-up.
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
CANDIDATES = {
    1: TOKENS, 2: TOKENS, 4: TOKENS, 8: TOKENS, 16: TOKENS, 32: FEW, 256: SOME, 1024: SOME,
    4096: MANY,
}  # fmt: skip


def _variants(tokens: int, best: FFNConfig, side: str) -> Iterator[FFNConfig]:
    gate_up, down = CANDIDATES[tokens]
    if side == "launch":
        yield replace(best, path="grouped")
    elif side == "gate_up":
        yield from (replace(best, gate_up=tile) for tile in gate_up)
    else:
        rows = best.gate_up.block_m
        yield from (replace(best, down=replace(tile, block_m=rows)) for tile in down)


def sweep(
    report: Any, layout: ExpertLayout, params: list[Tensor], top_k: int, budget: float
) -> list[str]:
    """Coordinate descent per number of tokens, within `budget` seconds for all of them."""
    lines = []
    deadline = time.perf_counter()
    for tokens in CANDIDATES:
        deadline += budget / len(CANDIDATES)
        p = make_problem(layout, params, tokens, top_k, "cuda")
        results: dict[str, Any] = {}

        def measure(config: FFNConfig, p: Problem = p, results: dict = results) -> float:
            return _measure(config, p, results)

        best = select_config(tokens, top_k, layout, device_of(params[0].device))
        best_time = default = measure(best)
        tried = 1
        for side in ("launch", "gate_up", "down"):
            for config in _variants(tokens, best, side):
                # The down side keeps a third of the time of each number of tokens.
                share = budget / len(CANDIDATES) / 3 if side == "gate_up" else 0.0
                if time.perf_counter() > deadline - share:
                    break
                tried += 1
                seconds = measure(config)
                if seconds < best_time:
                    best, best_time = config, seconds
        report.results[f"sweep W={tokens}"] = results
        lines.append(
            f"sweep W={tokens:5d}: default {default * 1e6:7.1f} us, best {best_time * 1e6:7.1f} us "
            f"with {best.path} {_brief(best.gate_up)} {_brief(best.down)} ({tried} tried)"
        )
        print(lines[-1], flush=True)
    return lines


def _measure(config: FFNConfig, p: Problem, results: dict[str, Any]) -> float:
    """Seconds of one call, noted in `results`; infinite if the tiles do not fit the GPU."""

    def call(r: int) -> Tensor:
        return expert_ffn(p.x[r], p.ids[r], p.weights[r], p.table, None, config)

    key = f"{config.path} {_brief(config.gate_up)} {_brief(config.down)}"
    try:
        results[key] = graph_seconds(call, 0.05)
    except Exception as error:
        results[key] = str(error)[:100]
        torch.cuda.synchronize()
        return float("inf")
    return results[key]


def _brief(t: Tile) -> str:
    return f"{t.block_m}x{t.block_n}x{t.block_k}/{t.num_warps}w{t.num_stages}s"
