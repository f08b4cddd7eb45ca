"""The expert FFN on the CPU beside the read bandwidth and the multiply-add peak of the same run."""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from spac import _C, reference  # noqa: F401  (_C loads the operators)
from spac.bench import llama
from spac.bench.arguments import positive
from spac.bench.report import Table, WrongResult
from spac.layout import ExpertLayout, ExpertTable
from spac.ops import expert_ffn_table
from spac.progress import progress
from spac.quantize import quantize
from spac.store import blob_views, host_memory

NAME = "cpu"
HELP = "expert FFN on the CPU: GB/s of distinct weights and GFLOP/s, against torch"
COLUMNS = ["case", "tokens", "dtype", "provider", "ms", "GB/s", "of read"]
COLUMNS += ["GFLOP/s", "of peak"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
QUANTIZED = {"int8": ("int8", 0), "int4": ("int4", 32), "int4-128": ("int4", 128)}  # form, group
ISAS = ("portable", "avx2", "avx512", "amx")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
ROTATION = 4  # routings (or sets of experts), so that no weights stay in the caches
READ_BYTES = 256 << 20
PEAK_STEPS = 2_000_000  # some milliseconds: wide vectors run slower after a while
Call = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, ids, weights -> y


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m spac.bench cpu`."""
    parser.add_argument("--experts", type=positive, default=128)
    parser.add_argument("--shape", type=positive, nargs=2, default=[2048, 768],
                        metavar=("HIDDEN", "INTERMEDIATE"))  # fmt: skip
    parser.add_argument("--top-k", type=positive, default=8)
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=[*DTYPES, *QUANTIZED],
                        help="of the weights; bf16 tokens where they are quantised")  # fmt: skip
    parser.add_argument("--tokens", nargs="*", type=positive, default=[1, 2, 4, 8, 16, 32],
                        help="random routing")  # fmt: skip
    parser.add_argument("--per-expert", nargs="*", type=positive, default=[4, 8, 16, 32, 64],
                        help="all tokens on the same TOP_K experts")  # fmt: skip
    parser.add_argument("--isa", nargs="+", default=[], choices=ISAS,
                        help="default: all that this CPU runs, but portable")  # fmt: skip
    parser.add_argument("--threads", type=positive, help="default: torch.get_num_threads()")
    parser.add_argument("--clock", choices=CLOCKS, default="wall",
                        help="cpu: CPU time per thread, for a machine in use")  # fmt: skip


@dataclass
class Weights:
    """The experts of one layer with random values, and who can compute them."""

    layout: ExpertLayout
    gate_up: Tensor
    down: Tensor

    @staticmethod
    def random(layout: ExpertLayout) -> Weights:
        E, H, inter = layout.num_experts, layout.hidden, layout.intermediate
        one = torch.randn(2 * inter, H, dtype=layout.dtype) / H**0.5
        gate_up, down = (
            host_memory(math.prod(s) * layout.dtype.itemsize).view(layout.dtype).view(s)
            for s in ((E, 2 * inter, H), (E, H, inter))
        )
        for e in range(E):  # rolled copies: randn for all of them would take minutes
            gate_up[e] = one.roll(e)
            down[e] = one[:inter].T.roll(e) * (H / inter) ** 0.5
        return Weights(layout, gate_up, down)

    def spac(self, isa: str) -> Call:
        table = ExpertTable.from_parameters(self.layout, self.gate_up, self.down)

        def call(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            torch.ops.spac.set_cpu_isa(isa)
            return expert_ffn_table(x, ids, weights, table, backend="cpu")

        return call

    def eager(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in ids.unique().tolist():
            token, choice = torch.where(ids == e)
            gate, up = F.linear(x[token], self.gate_up[e]).chunk(2, dim=-1)
            out = F.linear(F.silu(gate) * up, self.down[e])
            y.index_add_(0, token, out * weights[token, choice, None].to(x.dtype))
        return y

    def grouped_mm(self) -> Call:
        from transformers.integrations.moe import grouped_mm_experts_forward

        def apply_gate(h: Tensor) -> Tensor:
            gate, up = h.chunk(2, dim=-1)
            return F.silu(gate) * up

        module = SimpleNamespace(
            num_experts=self.layout.num_experts,
            gate_up_proj=self.gate_up,
            down_proj=self.down,
            has_gate=True,
            has_bias=False,
            is_transposed=False,
            has_post_expert_norm=False,
            _is_expert_parallel=False,
            _apply_gate=apply_gate,
        )
        return lambda x, ids, weights: grouped_mm_experts_forward(
            module, x, ids, weights.to(x.dtype)
        )

    def reference(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Only the experts in use are converted to fp32, since all of them may not fit."""
        used, local = ids.unique(return_inverse=True)
        layout = ExpertLayout(
            len(used), self.layout.hidden, self.layout.intermediate, torch.float32
        )
        gate_up, down = self.gate_up[used].float(), self.down[used].float()
        return reference.expert_ffn(x.float(), local, weights, gate_up, down, layout)


@dataclass
class QuantizedWeights:
    """The same quantised expert many times over, where it lies in the host store."""

    layout: ExpertLayout
    blobs: Tensor  # uint8 [E, blob_bytes]

    @staticmethod
    def random(layout: ExpertLayout) -> QuantizedWeights:
        E, H, inter = layout.num_experts, layout.hidden, layout.intermediate
        blobs = host_memory(E * layout.blob_bytes).view(E, layout.blob_bytes)
        one = {
            "gate_up": torch.randn(2 * inter, H) / H**0.5,
            "down": torch.randn(H, inter) / inter**0.5,
        }
        for name, section in quantize(one, layout).items():
            blob_views(blobs, layout)[name].copy_(section)
        return QuantizedWeights(layout, blobs)

    def spac(self, isa: str) -> Call:
        first, size = self.blobs.data_ptr(), self.layout.blob_bytes
        address = first + size * torch.arange(self.layout.num_experts)
        table = ExpertTable.from_blobs(self.layout, address, self.blobs)

        def call(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            torch.ops.spac.set_cpu_isa(isa)
            return expert_ffn_table(x, ids, weights, table, backend="cpu")

        return call

    def reference(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        used, local = ids.unique(return_inverse=True)
        sections = {n: v[used] for n, v in blob_views(self.blobs, self.layout).items()}
        layout = replace(self.layout, num_experts=len(used))
        return reference.expert_ffn_quantized(x.float(), local, weights, sections, layout)


def providers(
    weights: Weights | QuantizedWeights, isas: list[str], notes: list[str]
) -> dict[str, Call]:
    """Calls by name, each checked against the reference; the others are named in `notes`."""
    calls: dict[str, Call] = {f"spac {isa}": weights.spac(isa) for isa in isas}
    if isinstance(weights, Weights):
        calls["torch eager"] = weights.eager
        try:
            calls["transformers grouped_mm"] = weights.grouped_mm()
        except ImportError as error:
            notes.append(f"transformers grouped_mm: not available here: {error}")
        try:
            calls["llama.cpp"] = llama.Experts(weights.gate_up, weights.down)
        except ImportError as error:
            notes.append(f"llama.cpp: not available here: {error}")
    E, H = weights.layout.num_experts, weights.layout.hidden
    x = torch.randn(3, H, dtype=weights.layout.dtype)
    ids = torch.stack([torch.randperm(E)[: min(4, E)] for _ in range(3)])
    scale = torch.rand(ids.shape)
    expected = weights.reference(x, ids, scale)
    for name in list(calls):
        try:
            relative = (calls[name](x, ids, scale) - expected).norm() / expected.norm()
        except RuntimeError as failed:
            notes.append(f"{name}: failed: {str(failed).splitlines()[0]}")
            del calls[name]
            continue
        if not relative < 4 * torch.finfo(weights.layout.dtype).eps + 1e-5:
            raise WrongResult(f"{name}: wrong result, relative error {relative:.2g}")
    return calls


def available_isas() -> list[str]:
    """ISAs that this CPU can run, the portable one left out unless it is the only one."""
    found = []
    for isa in ISAS[1:]:
        try:
            torch.ops.spac.set_cpu_isa(isa)
            found.append(isa)
        except RuntimeError:
            continue
    return found or ["portable"]


def inputs(args: argparse.Namespace, case: str, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """(ids, routing weights) of each rotation."""
    out = []
    for i in range(ROTATION):
        if case == "random":
            ids = torch.stack([torch.randperm(args.experts)[: args.top_k] for _ in range(tokens)])
        else:
            first = i * args.top_k % max(1, args.experts - args.top_k + 1)
            ids = torch.arange(first, first + args.top_k).repeat(tokens, 1)
        out.append((ids.to(torch.int32), torch.rand(tokens, args.top_k)))
    return out


def measure(
    contenders: dict[str, Iterator[Callable[[], object]]], repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median seconds; contenders take turns, each call on the next input."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats + 1):
        for name, calls in contenders.items():
            call = next(calls)
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return {name: statistics.median(s[1:]) for name, s in seconds.items()}


def run(args: argparse.Namespace) -> Table:
    """Time every provider on every case; ISA and thread settings are put back at the end."""
    before = torch.get_num_threads()
    try:
        if args.threads:
            torch.set_num_threads(args.threads)
        return _run(args, torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
        torch.ops.spac.set_cpu_isa("")


def _run(args: argparse.Namespace, threads: int) -> Table:
    H, inter = args.shape
    if args.top_k > args.experts:
        raise ValueError(f"--top-k: at most --experts, {args.experts}, got {args.top_k}")
    available = available_isas()
    if missing := sorted(set(args.isa) - {"portable", *available}):
        raise ValueError(f"--isa: this CPU cannot run {', '.join(missing)}")
    isas = args.isa or available
    clock = CLOCKS[args.clock]
    scale = threads if args.clock == "cpu" else 1  # CPU time adds up over threads
    notes: list[str] = []
    rows: list[list[object]] = []
    data = host_memory(READ_BYTES).fill_(1)

    def peaks(isa: str, what: str) -> Callable[[], object]:
        def call() -> object:
            torch.ops.spac.set_cpu_isa(isa)
            if what == "read":
                return torch.ops.spac.cpu_read(data)
            return torch.ops.spac.cpu_multiply_add(PEAK_STEPS)

        return call

    cases = [("random", t) for t in args.tokens] + [("per expert", t) for t in args.per_expert]
    for dtype in args.dtype:
        tokens_dtype = DTYPES.get(dtype, torch.bfloat16)
        layout = ExpertLayout(args.experts, H, inter, tokens_dtype)
        weights: Weights | QuantizedWeights
        if dtype in QUANTIZED:
            weights = QuantizedWeights.random(layout.quantized(*QUANTIZED[dtype]))
        else:
            weights = Weights.random(layout)
        calls = providers(weights, isas, notes)
        for case, tokens in progress(cases, f"cpu {dtype}"):
            routings = inputs(args, case, tokens)
            x = torch.randn(tokens, H, dtype=tokens_dtype)
            contenders: dict[str, Iterator[Callable[[], object]]] = {
                name: itertools.cycle([partial(call, x, ids, w) for ids, w in routings])
                for name, call in calls.items()
            }
            for isa in isas:
                for what in ("read", "peak"):
                    contenders[f"{what} {isa}"] = itertools.repeat(peaks(isa, what))
            seconds = measure(contenders, args.repeats, clock)
            read = max(READ_BYTES / seconds[f"read {isa}"] * scale for isa in isas)
            flops = {}
            for isa in isas:
                torch.ops.spac.set_cpu_isa(isa)
                flops[isa] = (
                    torch.ops.spac.cpu_multiply_add(PEAK_STEPS) / seconds[f"peak {isa}"] * scale
                )
            distinct = statistics.mean(ids.unique().numel() for ids, _ in routings)
            size = distinct * weights.layout.blob_bytes
            work = tokens * args.top_k * 6 * H * inter
            for name in calls:
                s = seconds[name] / scale
                peak = flops.get(name.removeprefix("spac "), max(flops.values()))
                rows.append(
                    [case, tokens, dtype, name, s * 1e3, size / s / 1e9, size / s / read]
                    + [work / s / 1e9, work / s / peak]
                )
            rows.append([case, tokens, dtype, "(machine)", None, read / 1e9, 1.0])
            rows[-1] += [max(flops.values()) / 1e9, 1.0]
        del weights, calls
    notes += [
        f"{threads} thread(s), {args.clock} time, medians of {args.repeats} runs in turn",
        f"E={args.experts}, H={H}, I={inter}, top-{args.top_k}; GB/s counts distinct experts once",
        "(machine): reading 256 MiB, and independent multiply-adds, measured between the providers",
    ]
    return Table(COLUMNS, rows, "Expert FFN on the CPU", notes)
