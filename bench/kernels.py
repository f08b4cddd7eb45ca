"""The expert FFN of spac beside its peers: same inputs, same run, checked before it is timed.

On a GPU every provider is replayed from a CUDA graph over 8 random routings, so that weights come
from HBM and not from L2. The floor is the larger of: bytes of the distinct experts over the
memory bandwidth, and flops over the matmul rate, both measured on this device first.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from spac import ops, reference
from spac.bench.arguments import positive
from spac.bench.report import Table, WrongResult
from spac.layout import ExpertLayout, ExpertTable
from spac.plotting import pyplot
from spac.progress import progress

NAME = "kernels"
HELP = "expert FFN: spac beside transformers' experts backends, against the memory floor"
ROUNDS = 8
SHAPES: dict[str, tuple[int, int, int, int, dict[str, Any]]] = {
    "qwen3-30b-a3b": (128, 2048, 768, 8, {}),
    "mixtral-8x7b": (8, 4096, 14336, 2, {}),
    "deepseek-v2-lite": (64, 2048, 1408, 6, {}),
    "gpt-oss-20b": (
        32,
        2880,
        2880,
        4,
        {
            "transposed": True,
            "interleaved": True,
            "bias": True,
            "activation": "swiglu_clamp",
            "alpha": 1.702,
            "limit": 7.0,
        },
    ),
    "small": (16, 256, 128, 4, {}),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COLUMNS = ["tokens", "provider", "us", "GB/s", "TFLOP/s", "x floor", "x best peer", "error"]
PROVIDERS = ("spac", "grouped_mm", "batched_mm", "vllm", "torch")
Call = Callable[[int], Any]


@dataclass
class Problem:
    """One layer's weights and ROUNDS windows over it; `call(r)` means window r % ROUNDS."""

    layout: ExpertLayout
    params: list[Tensor]
    x: list[Tensor]
    ids: list[Tensor]
    weights: list[Tensor]

    @property
    def table(self) -> ExpertTable:
        return ExpertTable.from_parameters(self.layout, *self.params)

    def truth(self, r: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """The reference operator on window r, accumulated and returned in `dtype`."""
        bias = [None, None] if len(self.params) == 2 else self.params[2:]
        return reference.expert_ffn(
            self.x[r].to(dtype),
            self.ids[r],
            self.weights[r].to(dtype),
            self.params[0],
            self.params[1],
            self.layout,
            bias[0],
            bias[1],
        )

    def distinct_bytes(self) -> float:
        """Mean bytes of the experts that a window needs."""
        per_expert = 3 * self.layout.hidden * self.layout.intermediate * self.layout.dtype.itemsize
        return per_expert * statistics.mean(len(torch.unique(ids)) for ids in self.ids)

    def flops(self) -> float:
        return 6.0 * self.ids[0].numel() * self.layout.hidden * self.layout.intermediate


def make_params(layout: ExpertLayout, device: str) -> list[Tensor]:
    """Random gate_up, down and, if the layout has them, biases; outputs of order 1."""
    E, H, inter = layout.num_experts, layout.hidden, layout.intermediate
    shapes: list[tuple[tuple[int, ...], int]] = [((E, 2 * inter, H), H), ((E, H, inter), inter)]
    if layout.transposed:
        shapes = [((s[0], s[2], s[1]), n) for s, n in shapes]
    if layout.bias:
        shapes += [((E, 2 * inter), 4), ((E, H), 4)]
    out = []
    for shape, depth in shapes:
        t = torch.empty(shape, dtype=layout.dtype, device=device)
        out.append(t.normal_(std=depth**-0.5))
    return out


def make_problem(
    layout: ExpertLayout, params: list[Tensor], tokens: int, top_k: int, device: str
) -> Problem:
    """Uniform routing without repetition; softmax-like routing weights."""
    windows = []
    for _ in range(ROUNDS):
        scores = torch.rand(tokens, layout.num_experts, device=device)
        top = scores.topk(top_k, dim=-1)
        x = torch.randn(tokens, layout.hidden, device=device).to(layout.dtype)
        windows.append((x, top.indices.to(torch.int32), torch.softmax(top.values, -1)))
    return Problem(
        layout,
        params,
        x=[w[0] for w in windows],
        ids=[w[1] for w in windows],
        weights=[w[2] for w in windows],
    )


def make_provider(name: str, p: Problem) -> Call:
    """The provider's call on a window. Raises ImportError or ValueError if it cannot run here."""
    layout = p.layout
    device = p.params[0].device.type
    if name == "spac":
        table, backend = p.table, "triton" if device == "cuda" else "cpu"
        return lambda r: ops.expert_ffn_table(
            p.x[r], p.ids[r], p.weights[r], table, layout.dtype, backend
        )
    if name == "torch":
        return lambda r: p.truth(r, layout.dtype)
    if name == "vllm":
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

        if layout.activation != "silu" or layout.transposed or layout.interleaved or layout.bias:
            raise RuntimeError("vllm: its fused_experts has another layout")
        return lambda r: fused_experts(p.x[r], *p.params, p.weights[r], p.ids[r])
    from transformers.integrations import moe

    forward = getattr(moe, f"{name}_experts_forward")
    module = transformers_module(p)
    cast = [w.to(layout.dtype) for w in p.weights]
    ids = [i.long() for i in p.ids]
    return lambda r: forward(module, p.x[r], ids[r], cast[r])


def transformers_module(p: Problem) -> Any:
    """What transformers' expert functions read of an experts module."""
    layout = p.layout
    module = SimpleNamespace()
    module.num_experts = layout.num_experts
    module.has_gate, module.has_bias = True, layout.bias
    module.is_transposed, module.is_concatenated = layout.transposed, not layout.interleaved
    module._is_expert_parallel = module.has_post_expert_norm = False
    names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    for name, tensor in zip(names, p.params, strict=False):
        setattr(module, name, tensor)

    def apply_gate(h: Tensor) -> Tensor:
        gate, up = (h[..., ::2], h[..., 1::2]) if layout.interleaved else h.chunk(2, -1)
        return reference.activate(gate, up, layout)

    module._apply_gate = apply_gate
    return module


def graph_seconds(call: Call, seconds: float = 0.15, rounds: int = ROUNDS) -> float:
    """Median seconds of one call when `rounds` of them are replayed from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for r in range(min(2, rounds)):
            call(r)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for r in range(rounds):
            call(r)
    return event_seconds(graph.replay, seconds) / rounds


def event_seconds(run: Callable[[], Any], seconds: float = 0.15) -> float:
    """Median seconds of `run` by CUDA events, after a warm-up, for about `seconds` in all."""

    def once() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    first = statistics.median(once() for _ in range(3))
    return statistics.median(once() for _ in range(max(5, min(200, int(seconds / first)))))


def cpu_seconds(call: Call, seconds: float = 0.3) -> float:
    """Median seconds of a call on the CPU over rotating windows."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        call(len(times) % ROUNDS)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes/s, flop/s) of this device: a large copy and a large matmul in `dtype`."""
    big = 2**30 if device == "cuda" else 2**26
    size = 8192 if device == "cuda" else 768
    source = torch.randn(big // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timer = event_seconds if device == "cuda" else lambda run: cpu_seconds(lambda r: run())
    copy = timer(lambda: target.copy_(source))
    matmul = timer(lambda: a @ b)
    return 2.0 * big / copy, 2.0 * size**3 / matmul


def relative_error(y: Tensor, p: Problem, r: int = 0) -> float:
    truth = p.truth(r)
    return float((y.double() - truth).norm() / truth.norm())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = "qwen3-30b-a3b" if torch.cuda.is_available() else "small"
    parser.add_argument("--shape", choices=SHAPES, default=default)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--tokens", type=positive, nargs="+", default=[1, 4, 9, 32, 256, 1024, 4096]
    )
    parser.add_argument("--plot", metavar="FILE", help="roofline picture")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=PROVIDERS[:4])


def run(args: argparse.Namespace) -> Table:
    """One row per number of tokens and provider; raises if spac's result is wrong."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    E, H, inter, top_k, options = SHAPES[args.shape]
    layout = ExpertLayout(E, H, inter, DTYPES[args.dtype], **options)
    params = make_params(layout, device)
    bandwidth, rate = ceilings(device, layout.dtype)
    notes = [f"{args.shape}, {args.dtype}, {bandwidth / 1e9:.0f} GB/s, {rate / 1e12:.3g} TFLOP/s"]
    here = "no GPU here: spac beside torch, at most 64 tokens"
    notes.append("CUDA graph replay over 8 routings" if device == "cuda" else here)
    names = ["spac", "torch"] if device == "cpu" else list(args.providers)
    rows: list[list[Any]] = []
    tokens_list = [t for t in args.tokens if device == "cuda" or t <= 64]
    for tokens in progress(tokens_list, NAME):
        p = make_problem(layout, params, tokens, top_k, device)
        floor = max(p.distinct_bytes() / bandwidth, p.flops() / rate)
        times: dict[str, float] = {}
        errors: dict[str, float] = {}
        for name in names:
            if name == "batched_mm" and tokens * top_k > 64:
                continue  # it copies the weights of every pair
            try:
                call = make_provider(name, p)
                errors[name] = relative_error(call(0), p)
                times[name] = (graph_seconds if device == "cuda" else cpu_seconds)(call)
            except (ImportError, AttributeError, RuntimeError, TypeError) as error:
                notes.append(f"{name} at {tokens}: skipped, {str(error).splitlines()[0]}")
        if not errors.get("spac", 0.0) < {4: 1e-5, 2: 2e-2}[layout.dtype.itemsize]:
            raise WrongResult(f"spac at {tokens} tokens: error {errors['spac']:.1e}, not timed")
        for name, seconds in times.items():
            peers = [t for other, t in times.items() if other != name]
            rows.append(
                [
                    tokens,
                    name,
                    seconds * 1e6,
                    p.distinct_bytes() / seconds / 1e9,
                    p.flops() / seconds / 1e12,
                    seconds / floor,
                    min(peers) / seconds if peers else None,
                    errors[name],
                ]
            )
    if args.plot:
        _plot(args.plot, rows, bandwidth, rate, args.shape)
    return Table(COLUMNS, rows, f"expert FFN, {args.shape}", notes)


def _plot(path: str, rows: list[list[Any]], bandwidth: float, rate: float, title: str) -> None:
    """TFLOP/s over flops per byte of the distinct experts, below the two ceilings."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5))
    points: dict[str, list[tuple[float, float]]] = {}
    for _, name, _, gigabytes, teraflops, *_ in rows:
        points.setdefault(name, []).append((teraflops / gigabytes * 1e3, teraflops))
    for name, pairs in points.items():
        axes.plot(*zip(*pairs, strict=True), marker="o", label=name)
    reach = [x for pairs in points.values() for x, _ in pairs]
    line = torch.logspace(math.log10(min(reach) / 2), math.log10(max(reach) * 2), 50).tolist()
    roof = [min(x * bandwidth, rate) / 1e12 for x in line]
    axes.plot(line, roof, color="black", label=f"{bandwidth / 1e12:.2g} TB/s, {rate / 1e12:.3g}")
    axes.set(xscale="log", yscale="log", xlabel="flop per byte of distinct experts")
    axes.set(ylabel="TFLOP/s", title=f"expert FFN, {title}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
