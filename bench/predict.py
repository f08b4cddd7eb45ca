"""Predicted decode steps beside those that `bench generate --shape` measured."""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from spac.bench.replay import shape_cost
from spac.bench.report import Table
from spac.bench.synthetic import cut, split, tiled
from spac.config import SpacConfig
from spac.machine import MACHINES, find_machine
from spac.policy import make_policy
from spac.profile import Profile
from spac.replay import replay
from spac.trace import Trace, load_trace

NAME = "predict"
HELP = "replay what `bench generate --shape` ran: predicted and measured step times"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m spac.bench predict`: those of the run, with its defaults."""
    parser.add_argument("measured", help="JSON of bench generate --shape ... -o json --output FILE")
    parser.add_argument("--trace", required=True, metavar="FILE", help="the same as in that run")
    parser.add_argument("--shape", default="qwen3-30b-a3b")
    parser.add_argument("--profile", default="h200", help=f"{', '.join(MACHINES)} or a JSON file")
    parser.add_argument("--acceptance", type=float, default=0.7)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--warmup", type=int, default=32)
    parser.add_argument("--shift", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt-tokens", type=int, default=512,
                        help="0: a run of before the policy began from the prompt")  # fmt: skip


def run(args: argparse.Namespace) -> Table:
    """One row per draft length of the providers spac and resident."""
    with open(args.measured) as f:
        data = json.load(f)
    trace = load_trace(args.trace)
    try:
        lines = [m for m in data["rows"] if m["provider"] in ("spac", "resident")]
        rows = [_row(args, trace, m) for m in lines]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{args.measured}: no result of bench generate --shape: {error}") from None
    columns = ["provider", "slots", "gamma", "coverage", "coverage, measured", "ms/step"]
    columns += ["ms/step, measured", "ratio", "tokens/s", "tokens/s, measured"]
    notes = [
        f"cost model: {find_machine(args.profile).source}",
        "seconds of drafting are those measured; the rest of the step is predicted",
    ]
    return Table(columns, rows, f"predicted and measured, {args.profile}", notes)


def _row(args: argparse.Namespace, trace: Trace, measured: dict[str, Any]) -> list[Any]:
    gamma, resident = int(measured["gamma"]), measured["provider"] == "resident"
    share = 1.0 if resident else float(measured["slots"].rstrip("%")) / 100
    _, layers, _ = trace.shape
    quarter = trace.shape[0] // 4 if args.prompt_tokens else 0
    text = tiled(trace, quarter + args.warmup + args.tokens + 8 * (gamma + 1), args.shift)
    slots = round(share * layers * trace.num_experts)
    policy, rate = make_policy("spac", layers, trace.num_experts, slots), None
    if quarter:
        prompt, text = split(text, quarter)
        rate = Profile.of_trace(prompt).rate * (gamma + 1)
    windows = cut(text, args.warmup + args.tokens, gamma, args.acceptance, args.seed)
    result = replay(
        windows,
        policy,
        shape_cost(args.shape, args.profile, None, None),
        slots,
        streaming=True,
        max_copies=SpacConfig.max_copies,
        prompt=rate,
        draft_token=1e-3 * measured["draft ms"] / max(gamma, 1),
        warmup=args.warmup / text.shape[0],
    )
    step = 1e3 * statistics.median(result.step_seconds[-result.windows :])
    pairs = [result.coverage, measured["coverage"], step, measured["ms/step"]]
    pairs += [step / measured["ms/step"], result.tokens_per_second, measured["tokens/s"]]
    return [measured["provider"], measured["slots"], gamma, *pairs]
