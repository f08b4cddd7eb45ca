"""Predicted decode steps beside those that `bench generate --shape` measured."""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from typing import Any

from spac.bench.report import Table
from spac.bench.synthetic import Text
from spac.config import SpacConfig
from spac.cost import CostModel
from spac.machine import MACHINES, Machine, find_machine
from spac.policy import make_policy
from spac.profile import Profile
from spac.replay import Window, replay
from spac.trace import Trace, load_trace

NAME = "predict"
HELP = "replay what `bench generate --shape` ran: predicted and measured step times"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m spac.bench predict`; the run's own are in its file."""
    parser.add_argument("measured", help="JSON of bench generate --shape ... -o json --output FILE")
    parser.add_argument("--trace", required=True, metavar="FILE", help="the same as in that run")
    parser.add_argument("--profile", default="h200",
                        help=f"for the dense part and the hand-over: {', '.join(MACHINES)} or a "
                        "JSON file")  # fmt: skip


def run(args: argparse.Namespace) -> Table:
    """One row per draft length of the providers spac and resident."""
    from spac.bench.full_size import RUN

    try:
        with open(args.measured) as f:
            data = json.load(f)
    except ValueError as error:
        raise ValueError(f"{args.measured}: not JSON: {error}") from None
    trace = load_trace(args.trace).text()
    machine = find_machine(args.profile)
    try:
        note = next((n for n in data["notes"] if n.startswith(RUN)), None)
        if note is None:
            raise ValueError(f"no note {RUN!r}")
        said = json.loads(note.removeprefix(RUN))
        if not said["costs"]["h2d_byte"]:
            raise ValueError("it ran without a GPU, where there is no link to predict")
        text = Text(**said["text"])
        lines = [m for m in data["rows"] if m["provider"] in ("spac", "resident")]
        made = text.make(trace)
        rows = [_row(text, *made, said, machine, m) for m in lines]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{args.measured}: no result of bench generate --shape: {error}") from None
    columns = ["provider", "slots", "gamma"]
    for name in ("coverage", "GB/token", "copies/step", "ms/step"):
        columns += [name, f"{name}, measured"]
    columns += ["ratio", "tokens/s", "tokens/s, measured"]
    notes = [
        "experts on GPU, CPU and link: as the run measured them before its first row, of spac as "
        "its engine learnt them from the worker's clock and the device's wait",
        f"dense part and hand-over: {machine.name}: {machine.source}",
        "seconds of drafting are those measured; the rest of the step is predicted",
    ]
    return Table(columns, rows, f"predicted and measured, {args.profile}", notes)


def _row(
    text: Text,
    prompt: Trace,
    after: Trace,
    windows: dict[int, list[Window]],
    said: dict[str, Any],
    machine: Machine,
    measured: dict[str, Any],
) -> list[Any]:
    gamma, resident = int(measured["gamma"]), measured["provider"] == "resident"
    share = 1.0 if resident else float(measured["slots"].rstrip("%")) / 100
    _, layers, _ = after.shape
    slots = round(share * layers * after.num_experts)
    known = CostModel(**said.get(f"spac {slots} {gamma}", said["costs"]))
    costs = replace(
        known,
        dense_layer=machine.dense_layer,
        dense_token=machine.dense_token,
        handoff=machine.handoff,
    )
    result = replay(
        windows[gamma][: -text.PROFILED],
        make_policy("spac", layers, after.num_experts, slots),
        costs,
        slots,
        streaming=True,
        max_copies=SpacConfig.max_copies,
        keep=True,
        draft_copies=bool(said.get("draft_copies", False)),
        prompt=Profile.of_trace(prompt).rate * (gamma + 1),
        learnt=True,
        draft_token=1e-3 * measured["draft ms"] / max(gamma, 1),
        warmup=text.warmup / after.shape[0],
    )
    step = 1e3 * statistics.median(result.step_seconds[-result.windows :])
    pairs = [
        (result.coverage, measured["coverage"]),
        (result.bytes_per_token / 1e9, measured["GB/token"]),
        (result.copies / result.windows, measured["copies/step"]),
        (step, measured["ms/step"]),
        (step / measured["ms/step"],),
        (result.tokens_per_second, measured["tokens/s"]),
    ]
    return [measured["provider"], measured["slots"], gamma, *(x for pair in pairs for x in pair)]
