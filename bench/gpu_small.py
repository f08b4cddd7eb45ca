"""Timings of gpu_check beside the expert FFN's own table."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spac.bench.kernels import event_seconds, graph_seconds, make_problem, make_provider
from spac.handoff import HandOff
from spac.kernels import accept, combine, route, split_window, verify
from spac.kernels.expert_ffn import expert_ffn, expert_ffn_train
from spac.kernels.expert_ffn_backward import expert_ffn_backward
from spac.kernels.pull import pull
from spac.layout import ExpertLayout, ExpertTable, Places
from spac.pull import MOST_PLACES, Pull
from spac.store import HostStore

DEV = "cuda"


def _line(name: str, seconds: float | None, extra: str = "") -> str:
    return f"{name:34s} " + ("failed" if seconds is None else f"{seconds * 1e6:8.1f} us {extra}")


def small_kernels(report: Any) -> list[str]:
    """verify, combine and accept in a CUDA graph, 8 different inputs."""
    lines = []
    address = torch.arange(16, 144, device=DEV)
    utility, counters = (
        torch.zeros(128, dtype=torch.int32, device=DEV),
        torch.zeros(4).long().cuda(),
    )
    bounds = torch.tensor([2, 1], dtype=torch.int32, device=DEV)
    host, frequency = address + 1000, torch.zeros(128, dtype=torch.int64, device=DEV)
    streams = torch.arange(129, dtype=torch.int32, device=DEV) // 4
    some = address * (torch.arange(128, device=DEV) % 3 == 0)
    memory = torch.empty(MOST_PLACES, 256, dtype=torch.uint8, device=DEV)
    exchanged = torch.full((1, MOST_PLACES, 2), -1, dtype=torch.int32, device=DEV)
    places = Places.over(memory, torch.rand(1, 128, device=DEV), exchanged)[0]
    for W in (1, 9, 64):
        ids = [torch.randint(0, 128, (W, 8), device=DEV, dtype=torch.int32) for _ in range(8)]

        def run_verify(r: int, ids: list[Tensor] = ids) -> Any:
            return verify.verify(ids[r], address, utility, bounds, counters, 5)

        name = f"verify W={W}"
        lines.append(_line(name, report.part(name, lambda f=run_verify: graph_seconds(f))))

        def run_split(r: int, ids: list[Tensor] = ids) -> Any:
            state = utility, bounds, counters, frequency, streams, counters[:1]
            return split_window.split_window(ids[r], some, host, *state, 5, places)

        name = f"split window W={W}"
        lines.append(_line(name, report.part(name, lambda f=run_split: graph_seconds(f))))
        lines += _routing(report, W, address, utility, bounds, counters)
    parts = [[torch.randn(9, 2048, device=DEV) for _ in range(2)] for _ in range(8)]
    seconds = report.part(
        "combine W=9", lambda: graph_seconds(lambda r: combine.combine(parts[r], torch.bfloat16))
    )
    lines.append(_line("combine W=9", seconds))
    for name, busy in (("hand-over W=9", True), ("hand-over W=9, nothing for the CPU", False)):
        lines.append(_line(name, report.part(name, lambda b=busy: hand_over(b))))
    for dtype in (torch.bfloat16, torch.float32):
        lines += _accept(report, dtype)
    return lines


def hand_over(busy: bool, layers: int = 48, tokens: int = 9) -> float:
    """Seconds a layer of send, worker, wait and sum, without those that the worker computes: of one
    pair a token, small, or of none."""
    layout = ExpertLayout(8, 2048, 16, torch.bfloat16)
    store = HostStore([layout] * layers, pin=True)
    tables = [(store.allocate(), store.table(layer))[1] for layer in range(layers)]
    waited = torch.zeros(layers, dtype=torch.int32, device=DEV)
    link = HandOff(tables, tokens, 8, torch.bfloat16, waited)
    hidden = torch.randn(tokens, 2048, device=DEV).bfloat16()
    ids = torch.full((tokens, 8), -1, dtype=torch.int32, device=DEV)
    if busy:
        ids[:, 3] = torch.arange(tokens) % 8
    weights, partial = torch.rand(tokens, 8, device=DEV), torch.randn(tokens, 2048, device=DEV)

    def window() -> None:
        for layer in range(layers):
            link.send(layer, hidden, ids, weights)
            link.join(layer, partial, ids, torch.bfloat16)

    times = []
    try:
        link.begin(tokens)
        window()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            window()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(20):
            link.begin(tokens)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            computed = link.times.diff(dim=1).double().mean().item() * 1e-9
            times.append(begin.elapsed_time(end) * 1e-3 / layers - computed)
        link.check()
    finally:
        link.close()
    return statistics.median(times)


def _routing(
    report: Any, W: int, address: Tensor, utility: Tensor, bounds: Tensor, counters: Tensor
) -> list[str]:
    """Routing and verify in one launch, and transformers' routing operators without verify."""
    logits = [torch.randn(W, 128, device=DEV) for _ in range(8)]
    progress = torch.zeros(4, dtype=torch.int32, device=DEV)

    def ours(r: int) -> Any:
        return route.route_verify(
            logits[r], 8, True, address, utility, bounds, counters, progress, 5
        )

    def peer(r: int) -> Any:
        top, ids = torch.topk(torch.softmax(logits[r], dim=-1, dtype=torch.float32), 8, dim=-1)
        return (top / top.sum(-1, keepdim=True)).bfloat16(), ids

    return [
        _line(name, report.part(name, lambda f=f: graph_seconds(f)))
        for name, f in ((f"route and verify W={W}", ours), (f"torch routing alone W={W}", peer))
    ]


def _accept(report: Any, dtype: torch.dtype) -> list[str]:
    logits = [torch.randn(9, 151936, device=DEV).to(dtype) for _ in range(8)]
    draft = torch.randint(0, 151936, (8,), device=DEV)
    probs = torch.softmax(logits[0][:8].float(), -1)
    u = torch.rand(9, device=DEV)
    calls = {
        "greedy": lambda r: accept.accept_greedy(logits[r], draft),
        "sample one-hot": lambda r: accept.accept_sample(logits[r], draft, None, u),
        "sample": lambda r: accept.accept_sample(logits[r], draft, probs, u),
    }
    lines = []
    for name, call in calls.items():
        label = f"accept {name} W=9 {str(dtype)[6:]}"
        lines.append(_line(label, report.part(label, lambda f=call: graph_seconds(f))))
    return lines


def residency(report: Any, layout: ExpertLayout, params: list[Tensor], top_k: int) -> list[str]:
    """Time against the share of resident experts at W = 16 and 64."""
    lines = []
    for W in (16, 64):
        p = make_problem(layout, params, W, top_k, DEV)
        times = []
        for share in (1.0, 0.5, 0.25):
            here = torch.rand(layout.num_experts, device=DEV).argsort() < share * layout.num_experts
            table = replace(p.table, address=p.table.address * here)
            name = f"W={W}, {share:.0%} resident"
            times.append(
                report.part(
                    name,
                    lambda t=table, p=p: graph_seconds(
                        lambda r: expert_ffn(p.x[r], p.ids[r], p.weights[r], t)
                    ),
                )
            )
            lines.append(_line(name, times[-1]))
    return lines


def streaming(report: Any, layout: ExpertLayout, top_k: int) -> list[str]:
    """All experts in pinned host memory: GB/s over PCIe of their bytes."""
    blob, experts = layout.blob_bytes, 32
    small = replace(layout, num_experts=experts)
    pinned = torch.empty(experts, blob // 2, dtype=torch.bfloat16).normal_(std=0.02).pin_memory()
    address = pinned.data_ptr() + blob * torch.arange(experts, device=DEV)
    table = ExpertTable.from_blobs(small, address, owner=pinned)
    lines = []
    for W in (1, 9, 64):
        p = make_problem(small, [torch.empty(0, device=DEV)] * 2, W, top_k, DEV)
        name = f"streamed W={W}"
        seconds = report.part(
            name,
            lambda p=p: graph_seconds(lambda r: expert_ffn(p.x[r], p.ids[r], p.weights[r], table)),
        )
        rate = "" if seconds is None else f"{p.distinct_bytes() / seconds / 1e9:.1f} GB/s"
        lines.append(_line(name, seconds, rate))
    memory = torch.empty(MOST_PLACES, blob, dtype=torch.uint8, device=DEV)
    nothing = torch.full((1, MOST_PLACES, 2), -1, dtype=torch.int32, device=DEV)
    places = Pull(memory, nothing, [small]).places[0]
    places.source.copy_(address[:MOST_PLACES])
    places.target.copy_(memory.data_ptr() + blob * torch.arange(MOST_PLACES, device=DEV))
    name = f"{MOST_PLACES} experts into GPU memory"
    seconds = report.part(name, lambda: event_seconds(lambda: pull(places, blob), 0.3))
    rate = "" if seconds is None else f"{memory.numel() / seconds / 1e9:.1f} GB/s"
    lines.append(_line(name, seconds, rate))
    return lines


def training(report: Any, layout: ExpertLayout, params: list[Tensor], top_k: int) -> list[str]:
    """Forward and forward + backward at 8192 tokens, eager, beside grouped_mm's autograd."""
    tokens, lines = 8192, []
    p = make_problem(layout, params, tokens, top_k, DEV)
    x, ids, w = p.x[0], p.ids[0], p.weights[0]
    dy = torch.randn_like(x)

    def ours() -> None:
        _, saved = expert_ffn_train(x, ids, w, p.table)
        expert_ffn_backward(dy, x, ids, w, p.table, params[0], params[1], saved=saved)

    def peer() -> None:
        leaves = [t.detach().requires_grad_() for t in (x, *params)]
        q = replace(p, x=[leaves[0]] * 8, params=leaves[1:])
        make_provider("grouped_mm", q)(0).backward(dy)

    for name, run, passes in (
        ("forward 8192, saving", lambda: expert_ffn_train(x, ids, w, p.table), 1),
        ("forward + backward 8192", ours, 3),
        ("the same, grouped_mm", peer, 3),
    ):
        seconds = report.part(name, lambda f=run: event_seconds(f, 0.3))
        rate = "" if seconds is None else f"{passes * p.flops() / seconds / 1e12:.0f} TFLOP/s"
        lines.append(_line(name, seconds, rate))
    return lines
