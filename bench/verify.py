"""The verify step of one layer: spac's kernel beside the same work in plain torch operators."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spac import ops
from spac.bench.arguments import positive
from spac.bench.kernels import ROUNDS, cpu_seconds, graph_seconds
from spac.bench.report import Table, WrongResult
from spac.progress import progress

NAME = "verify"
HELP = "verify kernel: residency split, grouping and utility update of one layer's window"
COLUMNS = ["window", "experts", "top k", "provider", "us", "x torch"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--windows", type=positive, nargs="+", default=[1, 9, 16, 64])
    parser.add_argument("--experts", type=positive, default=128)
    parser.add_argument("--top-k", type=positive, default=8)


class _State:
    """Inputs of one layer, the same for both providers."""

    def __init__(self, window: int, experts: int, top_k: int, device: str) -> None:
        generator = torch.Generator(device).manual_seed(window)
        self.ids = [
            torch.rand(window, experts, generator=generator, device=device)
            .topk(top_k)
            .indices.to(torch.int32)
            for _ in range(ROUNDS)
        ]
        resident = torch.rand(experts, generator=generator, device=device) < 0.5
        self.address = resident * torch.arange(16, 16 + experts, device=device)
        self.utility = torch.zeros(experts, dtype=torch.int32, device=device)
        self.bounds = torch.tensor([2, 1], dtype=torch.int32, device=device)
        self.counters = torch.zeros(4, dtype=torch.int64, device=device)

    def step(self, r: int, backend: str) -> tuple[Tensor, ...]:
        return ops.verify(
            self.ids[r],
            self.address,
            self.utility,
            self.bounds,
            self.counters,
            backend=backend,
        )


def run(args: argparse.Namespace) -> Table:
    """One row per window and provider; raises if the two disagree in any bit."""
    if args.top_k > args.experts:
        raise ValueError(f"--top-k: at most --experts, {args.experts}, got {args.top_k}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backends = ["triton", "torch"] if device == "cuda" else ["torch"]
    note = "no GPU here: the torch operators only"
    if device == "cuda":
        note = f"CUDA graph replay over {ROUNDS} windows; torch eager, one synchronisation a call"
    rows: list[list[Any]] = []
    for window in progress(args.windows, NAME):
        shape = (window, args.experts, args.top_k)
        times = {}
        outputs = []
        for backend in backends:
            state = _State(*shape, device)
            outputs.append([*state.step(0, backend), state.utility.clone(), state.counters.clone()])
            # The reference's bincount reads a size back, which a graph cannot capture.
            measure = graph_seconds if backend == "triton" else _eager_seconds
            times[backend] = measure(partial(state.step, backend=backend))
        for ours, truth in zip(outputs[0], outputs[-1], strict=True):
            if not torch.equal(ours, truth):
                raise WrongResult(f"verify at window {window}: not equal to the reference")
        for backend, seconds in times.items():
            ratio = times["torch"] / seconds if backend == "triton" else None
            name = "spac" if backend == "triton" else "torch, eager"
            rows.append([*shape, name, seconds * 1e6, ratio])
    return Table(COLUMNS, rows, "verify window of one layer", [note])


def _eager_seconds(call: Any) -> float:
    if not torch.cuda.is_available():
        return cpu_seconds(call, 0.1)

    def synchronous(r: int) -> None:
        call(r)
        torch.cuda.synchronize()

    return cpu_seconds(synchronous, 0.1)
