"""Decode speed at full model size: spac beside other ways to run the same weights."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

import spac._C  # noqa: F401  (loads the operators)
from spac import ops
from spac.attachment import Binding
from spac.bench.arguments import fraction, not_negative, positive
from spac.bench.balance import THRESHOLDS
from spac.bench.full_size_check import LIMIT, layer_error
from spac.bench.full_size_table import COLUMNS, Figures, cells, margins
from spac.bench.providers import (
    Accelerated,
    AllOnCpu,
    AllResident,
    EngineProvider,
    GroupedMm,
    OnDemand,
    Provider,
)
from spac.bench.report import Table
from spac.bench.roofline import Machine, gpu_busy_share, measure_machine, sync
from spac.bench.synthetic import (
    DRAFTS,
    SHAPES,
    DenseDraft,
    Draft,
    ReplayedRouting,
    Synthetic,
    Text,
    build,
    make_draft,
)
from spac.budget import kv_cache_bytes, parameter_bytes
from spac.config import POLICIES, SpacConfig, format_bytes, parse_bytes
from spac.cores import set_ffn_threads
from spac.cost import CostModel, measure
from spac.experts import find_experts
from spac.layout import FORMS
from spac.progress import progress
from spac.replay import Window, window_counts
from spac.target import EagerTarget, StaticTarget, Target
from spac.trace import load_trace

DEFAULT = ("spac", "spac-eager", "lru", "static", "cpu", "stream", "resident")
PROVIDERS = (*DEFAULT, "grouped-mm", "accelerate")
WITHOUT_SLOTS = ("cpu", "stream", "resident", "grouped-mm", "accelerate")
RUN = "run: "  # begins the note that `bench predict` reads
_PROFILED = Text.PROFILED  # windows after the timed ones, for the GPU's busy time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "full size", "random weights of a --shape, routing replayed from --trace; --draft is "
        f"{', '.join(DRAFTS)} or none, --num-draft-tokens and --cache-ratio as above",
    )  # fmt: skip
    group.add_argument("--shape", choices=SHAPES, help="model of random weights, not --model")
    group.add_argument("--trace", metavar="FILE", help="npz routing trace (spac.trace)")
    group.add_argument("--layers", type=positive, help="default: those of the trace")
    group.add_argument(
        "--weights", choices=FORMS, default="float", help="of the experts; float: bf16"
    )
    group.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(DEFAULT))
    group.add_argument("--budget", metavar="SIZE", help="GPU bytes in all, not --cache-ratio")
    group.add_argument("--acceptance", type=fraction, default=0.7, help="chance of a drafted token")
    group.add_argument("--tokens", type=positive, default=96, help="of the text that is timed")
    group.add_argument("--warmup", type=not_negative, default=32, help="tokens before them")
    group.add_argument("--prompt-tokens", type=positive, default=512)
    group.add_argument("--shift", type=int, default=1, help="of expert ids when the trace repeats")
    group.add_argument("--link", type=float, metavar="GB/S", help="slow copies down to this")
    group.add_argument(
        "--thresholds", choices=THRESHOLDS, default="programme",
        help="who chooses what --policy spac-reference may copy: an ablation",
    )  # fmt: skip
    group.add_argument("--no-draft-copies", action="store_true", help="draft_copies=False for spac")
    group.add_argument("--cpu-threads", type=int, help="default: as spac.config has it")
    group.add_argument(
        "--limit", type=float, default=math.inf, metavar="S", help="begin no row later"
    )
    group.add_argument("--seed", type=int, default=0)


@dataclass
class Job:
    """What all providers share."""

    made: Synthetic
    routing: ReplayedRouting
    windows: dict[int, list[Window]]  # by gamma
    prompt: Tensor  # int32 [L, P, k]
    draft: Draft
    warmup: int  # tokens
    length: int  # tokens of KV cache
    threads: int  # of the CPU's FFN

    def target(self, provider: Provider) -> Target:
        """The forward as `provider` can have it: those that need ids on the host run eagerly."""
        if not provider.static:
            return EagerTarget(self.made.model)
        return StaticTarget(self.made.model, provider.engine, self.length)


@torch.no_grad()
def run(args: argparse.Namespace) -> Table:
    """One row per cache ratio, provider and draft length."""
    gammas = _check(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    trace = load_trace(args.trace).text()
    threads = set_ffn_threads(args.cpu_threads, device.type == "cuda")
    try:
        made = build(args.shape, trace, args.layers, device, args.weights)
        layers = len(made.store.layouts)
        plan = _text(args, gammas)
        begun, text, windows = plan.make(trace)
        routing = ReplayedRouting(text, layers, device)
        length = args.prompt_tokens + args.warmup + args.tokens + plan.spare + 2 * max(gammas) + 8
        job = Job(
            made,
            routing,
            windows,
            routing.window(begun.expert_ids),
            make_draft(args.draft, made, length),
            args.warmup,
            length,
            threads,
        )
        return _table(args, job, gammas, length)
    finally:
        torch.ops.spac.set_cpu_threads(0)


def _table(args: argparse.Namespace, job: Job, gammas: list[int], length: int) -> Table:
    start, made = time.perf_counter(), job.made
    layout, device = made.store.layouts[0], made.device
    machine = measure_machine(made.store.blobs, made.device)
    costs = measure(layout, device, limit_s=2.0)
    for _, module in find_experts(made.model):
        module.__dict__.pop("_spac_binding", None)
    for index, (_, module) in enumerate(find_experts(made.model)):
        binding: Any = Binding(job.routing, index, module)  # type: ignore[arg-type]
        module.__dict__["_spac_binding"] = binding
    everything = len(made.store.layouts) * layout.num_experts
    dense = _dense_bytes(made)
    rows: list[list[Any]] = []
    figures: dict[tuple[str, int, int], Figures] = {}
    said: dict[str, Any] = {"text": asdict(_text(args, gammas)), "costs": asdict(costs)}
    said["draft_copies"] = not args.no_draft_copies
    notes = _notes(args, job, machine, dense)
    ratios = _slots(args, made, everything, length)
    for slots, gamma, name in progress(list(product(ratios, gammas, args.providers)), "full size"):
        if time.perf_counter() - start > args.limit:
            notes.append(f"{name} at gamma {gamma}: not begun after {args.limit:g} s")
            continue
        try:
            make = partial(_provider, name, args, job, slots, costs, gamma)
            result = _measure(job, make, gamma)
        except torch.OutOfMemoryError:
            notes.append(f"{name} at gamma {gamma}: does not fit the GPU")
            continue
        except KeyboardInterrupt:
            notes.append(f"interrupted at {name}, gamma {gamma}")
            break
        speed = result.tokens / result.seconds
        print(f"{name}, gamma {gamma}: {speed:.3g} tokens/s", file=sys.stderr, flush=True)
        figures[name, slots, gamma] = result
        notes += [f"{name}: {reason}" for reason in result.eager]
        if result.split is not None:
            said[f"{name} {slots} {gamma}"] = asdict(result.split.costs)
            said[f"seen, {name} {slots} {gamma}"] = result.split.seen()
        share = None if name in WITHOUT_SLOTS else f"{slots / everything:.0%}"
        rows.append([name, share, gamma, *cells(result, machine, layout.blob_bytes, dense)])
    wrong = [f"{n} at gamma {g}" for (n, _, g), f in figures.items() if not f.error <= LIMIT]
    worst = max((f.error for f in figures.values()), default=0.0)
    notes.append(
        f"first, middle and last layer of one more window, rms against fp64: at most {worst:.2g}"
        + (f"; more than {LIMIT:.2g}: {', '.join(wrong)}" if wrong else "")
    )
    notes += [*margins(figures), RUN + json.dumps(said)]
    title = f"decode at full size: {args.shape}"
    return Table(list(COLUMNS), rows, title, notes, failed=bool(wrong))


def _provider(
    name: str, args: argparse.Namespace, job: Job, slots: int, costs: CostModel, gamma: int
) -> Provider:
    store, device = job.made.store, job.made.device
    link = args.link and args.link * 1e9
    if name in ("spac", "spac-eager", "static"):
        hot = None
        if name == "static":
            counts = window_counts(job.windows[gamma], store.layouts[0].num_experts)
            hot = counts[:, job.routing.layers].sum(axis=0)
        policy = "static" if name == "static" else args.policy
        config = SpacConfig(
            policy, max_window=max(32, gamma + 1), draft_copies=not args.no_draft_copies
        )
        top_k = job.prompt.shape[2]
        provider = EngineProvider(store, slots, top_k, device, config, costs, hot, link)
        provider.static = name == "spac"
        provider.engine.control.balancer.balancer = THRESHOLDS[args.thresholds]()
        return provider
    if name in ("lru", "stream"):
        return OnDemand(store, slots if name == "lru" else 0, device, link)
    if name in ("grouped-mm", "accelerate"):
        kind = GroupedMm if name == "grouped-mm" else Accelerated
        return kind(job.made.model, store, device)
    return AllOnCpu(store) if name == "cpu" else AllResident(store, device)


def _measure(job: Job, make: Callable[[], Provider], gamma: int) -> Figures:
    """Prefill, then all windows of `gamma`; those after the warm-up are timed."""
    device = job.made.device
    provider = job.routing.provider = make()
    try:
        ids = [job.routing.window(w.ids) for w in job.windows[gamma]]
        vocab = job.made.model.config.vocab_size
        prompt = torch.randint(0, vocab, (job.prompt.shape[1],), device=device)
        tokens = torch.randint(0, vocab, (gamma + 1,), device=device)
        for _ in range(1 if provider.slow else 2):  # the first compiles kernels
            target = job.target(provider)
            job.routing.ids = job.prompt
            start = time.perf_counter()
            int(target.prefill(prompt).argmax())
            ttft = time.perf_counter() - start
        seconds: list[float] = []
        drafting: list[float] = []
        new = [w.accepted + 1 for w in job.windows[gamma]]  # tokens
        accepted = torch.tensor(new, device=device) - 1
        stop = len(ids) - _PROFILED
        first = next(i for i in range(stop) if sum(new[:i]) >= job.warmup)
        timed = range(1, min(stop, 4)) if provider.slow else range(first, stop)
        job.routing.ids = torch.empty_like(ids[0])  # one place: a CUDA graph reads it

        def step(i: int) -> None:
            if isinstance(job.draft, DenseDraft):
                job.routing.provider.drafting(gamma)
            job.draft.run(gamma, job.routing.provider.launched)
            job.routing.ids.copy_(ids[i])
            job.routing.provider.begin(ids[i])
            logits = target.verify(tokens)
            target.read(ops.accept_greedy(logits, tokens[1:]))
            job.routing.provider.settle(accepted[i])
            target.finish(gamma + 1 - new[i])

        _each(step, range(timed.start))
        before, began = provider.read(), time.perf_counter()
        for i in timed:
            start = time.perf_counter()
            step(i)
            seconds.append(time.perf_counter() - start)
        elapsed = time.perf_counter() - began
        counts = provider.read() - before
        made = sum(new[i] for i in timed)
        for _ in range(3 if gamma else 0):
            sync(device)
            start = time.perf_counter()
            job.draft.run(gamma)
            sync(device)
            drafting.append(time.perf_counter() - start)
        draft = statistics.median(drafting) if drafting else 0.0
        busy = gpu_busy_share(device, partial(_each, step, range(stop, len(ids))))
        median = statistics.median(seconds)
        error = layer_error(job.made, provider, ids[-1])
        eager = list(target.reasons) if isinstance(target, StaticTarget) else []
        times = len(seconds), made, elapsed, median, draft, ttft
        return Figures(*times, counts, busy, eager, provider.split, error)
    finally:
        provider.close()
        del provider, job.routing.provider
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _each(step: Callable[[int], None], indices: range) -> None:
    for i in indices:
        step(i)


def _notes(args: argparse.Namespace, job: Job, machine: Machine, dense: int) -> list[str]:
    made, layout = job.made, job.made.store.layouts[0]
    trace = job.routing.trace
    draft = "costs nothing"
    if isinstance(job.draft, DenseDraft):
        draft = f"is a dense {args.draft} of random weights, {job.draft.how}"
    return [
        "shapes, bytes, routing locality and timing are real; weights are random, so text is not",
        f"{len(made.store.layouts)} layers, {layout.num_experts} experts ({args.weights}), top-"
        f"{trace.shape[2]} as recorded, {format_bytes(made.store.nbytes)} of experts, "
        f"{format_bytes(dense)} dense; made in {made.seconds:.1f} s",
        f"routing of {trace.model or args.trace}, ids moved on by {args.shift} when it repeats; "
        f"each drafted token accepted with chance {args.acceptance}; the draft {draft}",
        f"{args.tokens} tokens timed after {args.warmup}; prompt of {args.prompt_tokens}, "
        "with rows of the trace's first quarter, the text goes on after it; "
        "static knows its hot set from the same text (hindsight)",
        "spac, resident and grouped-mm run a window as CUDA graphs; the others wait for "
        "each layer's ids on the host, in transformers' eager forward",
        f"measured: CPU reads {machine.read / 1e9:.1f} GB/s on {job.threads} threads, link "
        f"{machine.link / 1e9:.1f} GB/s, GPU memory {machine.memory / 1e9:.0f} GB/s",
        "of roofline: the slowest of these for the bytes that the provider itself touched in its "
        "windows / the verify step without draft",
        "PCIe busy: bytes / link; CPU busy: seconds in the CPU kernels; GPU waits: seconds of its "
        "that had nothing to do but wait for them, in windows by flags; GPU busy: kernel time in "
        f"{_PROFILED} profiled windows"
        + (f"; copies at most {args.link} GB/s" if args.link else ""),
    ]


def _text(args: argparse.Namespace, gammas: list[int]) -> Text:
    options = (args.prompt_tokens, args.acceptance, args.shift, args.seed)
    return Text(tuple(gammas), args.tokens, args.warmup, *options)


def _check(args: argparse.Namespace) -> list[int]:
    if args.trace is None:
        raise ValueError("--shape: needs --trace FILE, the routing to replay")
    if args.weights != "float" and "grouped-mm" in args.providers:
        raise ValueError(f"--providers: grouped-mm has no {args.weights} experts")
    if args.draft not in (None, "none", *DRAFTS):
        raise ValueError(f"--draft: expected {', '.join(DRAFTS)} or none, got {args.draft}")
    texts = args.num_draft_tokens or ["0", "8"]
    if not all(text.isdecimal() for text in texts):
        raise ValueError(f"--num-draft-tokens: with --shape numbers only, got {' '.join(texts)}")
    if args.policy not in POLICIES:
        raise ValueError(f"--policy: expected one of {', '.join(POLICIES)}, got {args.policy}")
    return list(dict.fromkeys(map(int, texts)))


def _slots(args: argparse.Namespace, made: Synthetic, everything: int, length: int) -> list[int]:
    if args.budget is None:
        return [max(round(ratio * everything), 1) for ratio in args.cache_ratio or [0.17]]
    total, slot = parse_bytes(args.budget), made.store.layouts[0].blob_bytes
    fixed = _dense_bytes(made) + kv_cache_bytes(made.model.config, length, 2)
    if total < fixed + slot:
        raise ValueError(f"--budget: {format_bytes(fixed + slot)} needed, got {args.budget}")
    return [min((total - fixed) // slot, everything)]


def _dense_bytes(made: Synthetic) -> int:
    experts = {id(p) for _, module in find_experts(made.model) for p in module.parameters()}
    return parameter_bytes(made.model, experts)
