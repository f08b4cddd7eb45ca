"""Policies on real routing traces: coverage, bytes moved and predicted tokens per second."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spac.balance import Balancer
from spac.bench.arguments import fraction, not_negative, positive
from spac.bench.report import Table
from spac.cost import CostModel
from spac.draft_length import DraftLengthController
from spac.machine import MACHINES, find_machine
from spac.plotting import pyplot
from spac.policy import POLICIES, Policy, make_policy
from spac.profile import Profile, find_profile
from spac.progress import progress
from spac.replay import REJECTED, Replay, WindowSource, make_windows, oracle_bound, replay
from spac.trace import Trace, load_trace

NAME = "replay"
HELP = "replay routing traces: policies x cache share x window x bandwidth"
# hidden, intermediate of the models whose traces are in use; others need --shape
SHAPES = {
    "qwen3-30b-a3b": (2048, 768),
    "gemma-4-26b-a4b": (2816, 704),
    "gpt-oss-120b": (2880, 2880),
    "gpt-oss-20b": (2880, 2880),
}
COLUMNS = ["trace", "profile", "window", "cache", "GB/s", "policy", "coverage", "copies/window"]
COLUMNS += ["streamed/window", "kept/window", "MB/token", "late", "wasted", "tokens/s", "of oracle"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m spac.bench replay`."""
    parser.add_argument("traces", nargs="+", help="npz traces, or folders of them")
    parser.add_argument("--profile", default="h200", help=f"{', '.join(MACHINES)} or a JSON file")
    parser.add_argument("--policy", nargs="+", default=["spac", "activation", "lru", "lfu"],
                        choices=[p for p in POLICIES if p != "oracle"])  # fmt: skip
    parser.add_argument("--cache", nargs="+", type=fraction, default=[0.08, 0.17, 0.33],
                        help="share of the experts that have a slot")  # fmt: skip
    parser.add_argument("--window", nargs="+", type=_window, default=["8"], help="tokens, or auto")
    parser.add_argument("--bandwidth", nargs="+", type=float, help="host to GPU, GB/s")
    parser.add_argument("--acceptance", type=fraction, default=1.0)
    parser.add_argument("--rejected", choices=REJECTED, default="next")
    parser.add_argument("--rejected-weight", type=fraction, default=1.0)
    parser.add_argument("--streaming", action="store_true", help="three-way split")
    parser.add_argument("--max-copies", type=not_negative, metavar="N",
                        help="copy in rounds of N a window, as the engine does")  # fmt: skip
    parser.add_argument("--keep", action="store_true",
                        help="with both: what streams stays, the oracle's too")  # fmt: skip
    parser.add_argument("--draft-copies", action="store_true",
                        help="with --keep: copy what the last window used in drafts")  # fmt: skip
    parser.add_argument("--prompt", type=not_negative, default=0, metavar="TOKENS",
                        help="at the trace's start, which the policies begin from")  # fmt: skip
    parser.add_argument("--live", action="store_true", help="scores may change within a window")
    parser.add_argument("--balance", action="store_true", help="thresholds by the balancer")
    parser.add_argument(
        "--warmup", type=fraction, default=0.25, help="share of the trace not counted"
    )
    parser.add_argument("--start", metavar="FILE", help="begin warm: profile or trace of the model")
    parser.add_argument("--shape", type=positive, nargs=2, metavar=("HIDDEN", "INTERMEDIATE"))
    parser.add_argument("--plot", metavar="FILE", help="curves and a residency heat map")


def _window(text: str) -> str:
    return text if text == "auto" else str(positive(text))


def find_traces(names: list[str]) -> list[tuple[str, Trace]]:
    """(name, trace) of every file and of every npz in every folder."""
    paths: list[Path] = []
    for name in map(Path, names):
        paths += sorted(name.glob("*.npz")) if name.is_dir() else [name]
    if not paths:
        raise ValueError(f"traces: no npz files in {', '.join(names)}")
    return [(p.stem, load_trace(p).text()) for p in paths]


def shape_cost(name: str, profile: str, shape: list[int] | None, gbs: float | None) -> CostModel:
    """Cost model of a bf16 gated FFN of that shape on that machine, 2 bytes a weight."""
    known = next((s for key, s in SHAPES.items() if name.startswith(key)), None)
    if shape is None and known is None:
        raise ValueError(f"shape: needed --shape HIDDEN INTERMEDIATE for the trace {name!r}")
    hidden, inter = shape or known or (0, 0)
    machine = find_machine(profile)
    if gbs is not None:
        change = gbs * 1e9 / machine.h2d_bandwidth  # streams cross the same link
        machine = replace(
            machine, h2d_bandwidth=gbs * 1e9, stream_bandwidth=change * machine.stream_bandwidth
        )
    return machine.cost(6 * hidden * inter, 6 * hidden * inter)


def after_prompt(trace: Trace, tokens: int) -> tuple[NDArray[np.float64], Trace]:
    """Pairs a token [L, E] of the first `tokens` tokens (at most a quarter); the text after."""
    prompt, text = trace.split(min(tokens, trace.shape[0] // 4))
    return Profile.of_trace(prompt).rate, text


def run(args: argparse.Namespace) -> Table:
    """One row per combination; the last column compares with the prefetch oracle."""
    if args.keep and (args.max_copies is None or not args.streaming):
        raise ValueError("replay: --keep needs --streaming and --max-copies")
    if args.draft_copies and not args.keep:
        raise ValueError("replay: --draft-copies needs --keep")
    if args.warmup == 1:
        raise ValueError("--warmup: must be less than 1, or nothing is counted")
    draft = find_machine(args.profile).draft_token
    rows: list[list[Any]] = []
    kept: list[tuple[list[Any], Replay]] = []
    cases = itertools.product(
        find_traces(args.traces), args.window, args.cache, args.bandwidth or [None]
    )
    for (name, trace), window, share, gbs in progress(list(cases), "replay"):
        cost = shape_cost(name, args.profile, args.shape, gbs)
        _, layers, _ = trace.shape
        slots = int(share * layers * trace.num_experts)
        options = {"streaming": args.streaming, "draft_token": draft, "warmup": args.warmup}
        begin = rate = None
        if args.prompt:
            rate, trace = after_prompt(trace, args.prompt)
        if args.start:
            begin = find_profile(args.start, layers, trace.num_experts, trace.shape[2])
        if rate is not None:
            options["prompt"] = rate * (5 if window == "auto" else int(window))
        oracle = None
        rounds = {"max_copies": args.max_copies, "keep": args.keep}
        rounds["draft_copies"] = args.draft_copies
        if window != "auto":
            windows = make_windows(trace, int(window) - 1, args.acceptance, args.rejected)
            bound = options | {"profile": begin} | (rounds if args.keep else {})
            oracle = oracle_bound(windows, trace.num_experts, cost, slots, **bound)
        for policy_name in args.policy:
            weight = args.rejected_weight
            policy = make_policy(policy_name, layers, trace.num_experts, slots, weight)
            if args.live or policy_name == "activation":
                options["live"] = True
            options |= {"profile": begin, **rounds}
            if window == "auto":
                source = WindowSource(trace, args.acceptance, args.rejected)
                result = replay_auto(source, policy, cost, slots, **options)
            else:
                balancer = Balancer() if args.balance else None
                result = replay(windows, policy, cost, slots, balancer=balancer, **options)
            options.pop("live", None)
            for key in ("profile", *rounds):
                options.pop(key, None)
            row = [name, args.profile, window, share, round(1e-9 / cost.h2d_byte, 1), policy_name]
            rows.append(row + _figures(result, oracle))
            kept.append((row, result))
    if args.plot:
        _plot(args.plot, rows, kept)
    notes = [
        f"predicted by the cost model of {args.profile!r}: {find_machine(args.profile).source}",
        f"first {args.warmup:.0%} of each trace not counted; acceptance {args.acceptance:g},"
        f" rejected rows routed by the model {args.rejected!r}",
        "oracle: knows the future, same link and pool, best of its discounts"
        + (", copies and keeps as the policies do" if args.keep else ", no rounds"),
    ]
    return Table(COLUMNS, rows, "Replay of routing traces", notes)


def replay_auto(
    source: WindowSource, policy: Policy, cost: CostModel, slots: int, max_gamma: int = 8, **options
) -> Replay:
    """Replay in which the draft length controller picks every window; seconds are predicted."""
    control = DraftLengthController(max_gamma)
    draft = options["draft_token"]

    def windows():
        while (window := source.draw(control.choose())) is not None:
            yield window

    def observe(window, seconds):
        gamma = len(window.ids) - 1
        control.observe(gamma, window.accepted, seconds - draft * gamma, draft * gamma)

    return replay(windows(), policy, cost, slots, on_window=observe, **options)


def _figures(r: Replay, oracle: Replay | None) -> list[Any]:
    n = max(r.windows, 1)
    return [
        r.coverage,
        r.copies / n,
        r.streamed / n,
        r.kept / n,
        r.bytes_per_token / 1e6,
        r.late,
        r.wasted,
        r.tokens_per_second,
        r.tokens_per_second / oracle.tokens_per_second if oracle and oracle.windows else None,
    ]


def _plot(path: str, rows: list[list[Any]], kept: list[tuple[list[Any], Replay]]) -> None:
    plt = pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    at = {c: COLUMNS.index(c) for c in ("policy", "cache", "coverage", "tokens/s")}
    for policy in dict.fromkeys(r[at["policy"]] for r in rows):
        mine = [r for r in rows if r[at["policy"]] == policy]
        shares = sorted({r[at["cache"]] for r in mine})
        for axis, what in ((left, "coverage"), (middle, "tokens/s")):
            mean = [
                sum(values) / len(values)
                for s in shares
                if (values := [r[at[what]] for r in mine if r[at["cache"]] == s])
            ]
            axis.plot(shares, mean, marker="o", label=policy)
            axis.set(xlabel="share of experts with a slot", ylabel=f"{what}, mean of traces")
    left.legend()
    row, result = kept[0]
    image = right.imshow([list(r) for r in zip(*result.residency, strict=True)], aspect="auto")
    right.set(xlabel="window", ylabel="layer", title=f"slots held: {row[0]}, {row[5]}")
    figure.colorbar(image, ax=right)
    figure.savefig(path, dpi=120)
    plt.close(figure)
