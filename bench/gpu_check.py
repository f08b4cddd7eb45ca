"""`python -m spac.bench.gpu_check`: every kernel on a CUDA device, checked in fp64, then timed.

For whoever changes kernels/: one command on the target GPU, a short table last, all figures as
JSON in --out. One part that fails is reported and does not stop the others.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spac import reference
from spac.bench import gpu_decoder, gpu_small
from spac.bench.kernels import (
    SHAPES,
    Problem,
    graph_seconds,
    make_params,
    make_problem,
    make_provider,
)
from spac.kernels import accept, combine, settle, verify
from spac.kernels.expert_ffn import choose, expert_ffn, expert_ffn_train
from spac.kernels.expert_ffn_backward import expert_ffn_backward
from spac.layout import ExpertLayout, ExpertTable

HBM, MATMUL = 4.3e12, 790e12  # H200, measured: docs/kernels.md
WINDOWS = (1, 2, 4, 8, 9, 16, 32, 64, 256, 1024, 4096)
PARTS = ("correctness", "timing", "decoder", "steps", "all")
DEV = "cuda"


class Report:
    """Collects what each named part returned or how it failed."""

    def __init__(self) -> None:
        self.results: dict[str, Any] = {}
        self.failures: list[str] = []

    def part(self, name: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        try:
            self.results[name] = result = run()
            torch.cuda.synchronize()
        except Exception as error:
            last = traceback.format_exc().strip().splitlines()[-1][:300]
            self.failures.append(f"{name}: {last}")
            self.results[name] = result = None
            print(f"FAIL {name}: {last}", flush=True)
            if "CUDA error" in str(error):
                raise SystemExit("the device is lost after a CUDA error") from error
        else:
            print(f"ok   {name} {time.perf_counter() - start:.1f} s {_short(result)}", flush=True)
        return result


def _short(result: Any) -> str:
    return "" if result is None else str(result)[:160]


def error_of(y: Tensor, truth: Tensor) -> float:
    if not torch.isfinite(y).all():
        raise AssertionError("result is not finite")
    return float((y.double() - truth).norm() / truth.norm().clamp(min=1e-30))


def check_forward(p: Problem, table: ExpertTable | None = None, path: str | None = None) -> str:
    """Error at most twice that of a matmul chain rounded to the dtype, same bits twice."""
    layout, x, ids, w = p.layout, p.x[0], p.ids[0], p.weights[0]
    tokens = ids.shape[0]
    table = table or p.table
    config = choose(x, ids, table, path)
    truth = p.truth(0)
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-21}[layout.dtype]
    torch.cuda.empty_cache()
    poison = torch.full((2**26,), float("nan"), device=DEV)  # what torch.empty will hand out
    del poison
    y = expert_ffn(x, ids, w, table, None, config)
    worst = error_of(y, truth)
    if worst > 1.2 * unit:
        raise AssertionError(f"{config.path}, {tokens} tokens: error {worst:.1e}")
    if not torch.equal(y, expert_ffn(x, ids, w, table, None, config)):
        raise AssertionError(f"{config.path}, {tokens} tokens: not the same bits twice")
    return f"{worst:.1e}"


def correctness(report: Report) -> None:
    torch.manual_seed(0)
    oss = SHAPES["gpt-oss-20b"][4] | {"limit": 1.5}
    for name, options in (("plain", {}), ("gpt-oss", oss), ("blob-like", {"interleaved": True})):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            layout = ExpertLayout(7, 200, 88, dtype, **options)
            params = make_params(layout, DEV)
            for tokens, path in ((5, "tokens"), (5, "grouped"), (300, "grouped")):
                p = make_problem(layout, params, tokens, 3, DEV)
                p.ids[0][0, 0], p.ids[0][1, 1] = -1, 7
                label = f"{name} {str(dtype)[6:]} T={tokens} {path}"
                report.part(label, partial(check_forward, p, None, path))
            p = make_problem(layout, params, 60, 3, DEV)
            report.part(f"backward {name} {str(dtype)[6:]}", partial(check_backward, p))
    for name in ("plain", "interleaved"):  # rows enough for descriptors, where there are any
        layout = ExpertLayout(7, 192, 88, torch.float16, interleaved=name == "interleaved")
        p = make_problem(layout, make_params(layout, DEV), 300, 3, DEV)
        p.ids[0][0, 0], p.ids[0][1, 1] = -1, 7
        report.part(f"many rows, {name}", partial(check_forward, p))
        report.part(f"many rows, backward, {name}", partial(check_backward, p))
    check_real_shape(report)
    torch.cuda.empty_cache()
    report.part("verify", check_verify)
    report.part("settle, combine", check_settle)
    report.part("accept", check_accept)


def check_real_shape(report: Report) -> None:
    E, H, inter, top_k, options = SHAPES["qwen3-30b-a3b"]
    layout = ExpertLayout(E, H, inter, torch.bfloat16, **options)
    params = make_params(layout, DEV)
    for tokens in (*range(1, 18), 31, 32, 33, 64, 100, 256, 1024, 4096):
        p = make_problem(layout, params, tokens, top_k, DEV)
        report.part(f"qwen T={tokens}", partial(check_forward, p))
    p = make_problem(layout, params, 40, top_k, DEV)
    p.ids[0][:] = p.ids[0][:1].clone()
    report.part("qwen T=40, 8 experts take all", lambda: check_forward(p))
    report.part("qwen, three memories", lambda: check_memories(layout, params, top_k))


def check_backward(p: Problem) -> str:
    x, ids, w = p.x[0], p.ids[0], p.weights[0]
    dy = torch.randn_like(x)
    leaves = [t.double().requires_grad_() for t in (x, w, *p.params)]
    both = replace(p, params=leaves[2:], x=leaves[:1], weights=leaves[1:2])
    y = both.truth(0)
    truth = torch.autograd.grad(y, leaves, dy.double())
    _, saved = expert_ffn_train(x, ids, w, p.table)
    unit = {2: 2**-6, 4: 2**-19}[p.layout.dtype.itemsize]
    params: list[Any] = [*p.params, None, None][:4]
    backward: Any = partial(expert_ffn_backward, dy, x, ids, w, p.table, *params)
    runs = [backward(saved=s) for s in (saved, None)]
    errors = []
    for grad, again, exact in zip(*runs, truth, strict=False):
        errors.append(error_of(grad, exact))
        if not torch.equal(grad, again):
            raise AssertionError("not the same bits twice")
    # A clamp whose side flips by rounding moves single gradients by more than a rounding error.
    if max(errors) > unit * (8 if p.layout.activation == "swiglu_clamp" else 1):
        raise AssertionError(f"errors {[f'{e:.1e}' for e in errors]}")
    return f"{max(errors):.1e}"


def check_memories(layout: ExpertLayout, params: list[Tensor], top_k: int) -> str:
    """Experts in a slot pool, in parameters and in pinned host memory, and some nowhere."""
    p = make_problem(layout, params, 9, top_k, DEV)
    host = [t[:16].cpu().pin_memory() for t in params]
    table = p.table
    address = table.address.clone()
    blob = layout.blob_bytes
    pool = torch.zeros(24, blob, dtype=torch.uint8, device=DEV)
    pinned = torch.zeros(16, blob, dtype=torch.uint8).pin_memory()
    for memory, first, where in ((pool, 16, params), (pinned, 0, host)):
        for i in range(memory.shape[0]):
            flat = torch.cat([t[first + i].reshape(-1).view(torch.uint8) for t in where])
            memory[i, : flat.numel()] = flat
    blobs = ExpertTable.from_blobs(layout, address)
    address[:] = 0
    address[:16] = pinned.data_ptr() + blob * torch.arange(16, device=DEV)
    address[16:40] = pool.data_ptr() + blob * torch.arange(24, device=DEV)
    p.ids[0] = torch.where(p.ids[0] >= 40, p.ids[0] % 40, p.ids[0])
    p.ids[0][0] = torch.arange(36, 36 + top_k, device=DEV)  # experts 40.. are nowhere
    seen = torch.where(p.ids[0] < 40, p.ids[0], -1)
    y = expert_ffn(p.x[0], p.ids[0], p.weights[0], replace(blobs, address=address))
    truth = replace(p, ids=[seen]).truth(0)
    worst = error_of(y, truth)
    if worst > 6e-3:
        raise AssertionError(f"error {worst:.1e}")
    return f"{worst:.1e}"


def check_verify() -> str:
    for W, k, E in ((1, 8, 128), (9, 8, 128), (64, 8, 128), (16, 16, 512), (1000, 8, 256)):
        for absent in (0.0, 0.6):
            states = []
            ids = torch.randint(-1, E + 1, (W, k), device=DEV, dtype=torch.int32)
            address = (torch.rand(E, device=DEV) >= absent) * torch.arange(16, E + 16, device=DEV)
            start = torch.randint(0, 6, (E,), device=DEV, dtype=torch.int32)
            for run in (verify.verify, reference.verify):
                utility, counters = start.clone(), torch.zeros(4, dtype=torch.int64, device=DEV)
                bounds = torch.tensor([2, 1], dtype=torch.int32, device=DEV)
                states.append([*run(ids, address, utility, bounds, counters, 5), utility, counters])
            for ours, truth in zip(*states, strict=True):
                if not torch.equal(ours, truth):
                    raise AssertionError(f"W={W} k={k} E={E} absent={absent}")
    return "equal"


def check_settle() -> str:
    before = torch.randint(0, 6, (4, 128), device=DEV, dtype=torch.int32)
    ids = torch.randint(-1, 129, (4, 9, 8), device=DEV, dtype=torch.int32)
    bounds = torch.tensor([[2, 1]] * 4, dtype=torch.int32, device=DEV)
    for weight in (0.0, 0.1, 0.7, 1.0):
        results = []
        for run in (settle.settle, reference.settle):
            utility = before.clone()
            run(utility, before, ids, torch.tensor(3, device=DEV), bounds, weight, 5)
            results.append(utility)
        if not torch.equal(*results):
            raise AssertionError(f"settle at weight {weight}")
    parts = [torch.randn(9, 2048, device=DEV) for _ in range(3)]
    if not torch.equal(
        combine.combine(parts, torch.bfloat16), (parts[0] + parts[1] + parts[2]).bfloat16()
    ):
        raise AssertionError("combine")
    return "equal"


def check_accept() -> str:
    """Equal to the reference on a real vocabulary; chi-square of the first token at p = 1e-5."""
    V, different = 151936, 0
    for dtype in (torch.float32, torch.bfloat16):
        for trial in range(12):
            logits = (torch.randn(9, V, device=DEV) * 3).to(dtype)
            draft = logits.argmax(-1)[:-1].clone()
            draft[trial % 8] = trial
            ours = accept.accept_greedy(logits, draft).tolist()
            rows = [int(torch.nonzero(r == r.max())[0]) for r in logits]  # lowest index of ties
            wrong = [i for i in range(8) if rows[i] != draft[i]] + [8]
            if ours != [wrong[0], rows[wrong[0]]]:
                raise AssertionError(f"greedy {ours}")
            probs = torch.softmax(torch.randn(8, V, device=DEV) * 3, -1) if trial % 2 else None
            u = torch.rand(9, device=DEV)
            pair = [
                run(logits, draft, probs, u).tolist()
                for run in (accept.accept_sample, reference.accept_sample)
            ]
            different += pair[0] != pair[1]
    logits = torch.randn(2, 8, device=DEV)
    q = torch.softmax(torch.randn(1, 8, device=DEV), -1)
    counts, runs = torch.zeros(8), 4000
    for d in torch.multinomial(q[0], runs, replacement=True).split(1):
        accepted, token = accept.accept_sample(logits, d, q, torch.rand(2, device=DEV)).tolist()
        counts[int(d) if accepted else token] += 1
    expected = torch.softmax(logits[0].double(), -1).cpu() * runs
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    if chi_square > 36 or different > 1:
        raise AssertionError(f"chi-square {chi_square:.1f} (7), {different} of 24 differ")
    return f"chi-square {chi_square:.1f} (7 degrees), {different} of 24 differ by rounding"


def _graph_of(name: str, p: Problem) -> float:
    return graph_seconds(make_provider(name, p))


def timing(report: Report) -> list[str]:
    """The expert FFN against its floor, then the small kernels, streaming and training."""
    E, H, inter, top_k, options = SHAPES["qwen3-30b-a3b"]
    layout = ExpertLayout(E, H, inter, torch.bfloat16, **options)
    params = make_params(layout, DEV)
    lines = []
    for tokens in WINDOWS:
        p = make_problem(layout, params, tokens, top_k, DEV)
        floor = max(p.distinct_bytes() / HBM, p.flops() / MATMUL)
        row: dict[str, float] = {"floor": floor}
        for name in ("spac", "grouped_mm"):
            label = f"{name} W={tokens}"
            seconds = report.part(label, partial(_graph_of, name, p))
            row[name] = seconds if seconds is not None else float("nan")
        report.results[f"W={tokens}"] = row
        lines.append(
            f"W={tokens:5d} floor {floor * 1e6:7.1f} spac {row['spac'] * 1e6:7.1f} us "
            f"= {row['spac'] / floor:5.2f} x floor, "
            f"grouped_mm {row['grouped_mm'] * 1e6:7.1f} = {row['grouped_mm'] / row['spac']:5.2f} x"
        )
    lines += gpu_small.small_kernels(report)
    lines += gpu_small.residency(report, layout, params, top_k)
    lines += gpu_small.streaming(report, layout, top_k)
    lines += gpu_small.training(report, layout, params, top_k)
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m spac.bench.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write gpu_check.json there")
    parser.add_argument("--part", choices=PARTS, default="all")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_check: no CUDA device", file=sys.stderr)
        return 2
    report, lines = Report(), []
    if args.part in ("correctness", "all"):
        correctness(report)
    if args.part in ("timing", "all"):
        lines += timing(report)
    if args.part in ("decoder", "all"):
        lines += gpu_decoder.decoder(report)
    if args.part in ("steps", "all"):
        lines += gpu_decoder.steps(report)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        content = {"results": report.results, "failures": report.failures, "table": lines}
        (args.out / "gpu_check.json").write_text(json.dumps(content, indent=1, default=str))
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("\n".join(lines))
    print("\n".join(f"FAILED {f}" for f in report.failures) or "no failures")
    return 1 if report.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
