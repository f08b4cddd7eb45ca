"""The paper's evaluation: seven benchmarks, batch 1, spac beside baselines over the same weights.

Every generation is a line of a json lines file, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from spac.attachment import attach, attachment, detach
from spac.bench.arguments import fraction, positive
from spac.bench.generate import _load
from spac.bench.paper_data import SOURCES, load_prompts
from spac.bench.report import Table
from spac.budget import bytes_for_ratio
from spac.config import SpacConfig
from spac.draft_length import parse_draft_length
from spac.progress import progress
from spac.speculative import GenerationResult, generate

NAME = "paper"
HELP = "the paper's seven benchmarks: tokens/s and latency, spac beside its baselines, resumable"
COLUMNS = ["benchmark", "contender", "draft", "samples", "tokens/s", "spac / this", "ms/token"]
COLUMNS += ["prefill ms", "latency s", "accepted", "coverage", "same text"]


@dataclass(frozen=True)
class Contender:
    policy: str
    drafts: bool
    resident: bool = False  # every expert in a slot


CONTENDERS = {
    "spac": Contender("spac", True),
    "lru": Contender("lru", True),
    "static": Contender("static", True),
    "spac, no draft": Contender("spac", False),
    "lru, no draft": Contender("lru", False),
    "static, no draft": Contender("static", False),
    "resident": Contender("static", True, resident=True),
    "resident, no draft": Contender("static", False, resident=True),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PATH", help="default: the bundled model")
    parser.add_argument(
        "--draft", metavar="PATH|ngram", help="default: the bundled draft, or ngram"
    )
    parser.add_argument("--data", metavar="DIR", help="with NAME.jsonl, .json, .csv or .parquet")
    parser.add_argument("--benchmark", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--contender", nargs="+", choices=CONTENDERS, default=list(CONTENDERS),
                        metavar="NAME", help="; ".join(CONTENDERS))  # fmt: skip
    parser.add_argument(
        "--samples", type=positive, default=10, metavar="N", help="of each benchmark"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=128)
    parser.add_argument(
        "--max-prompt-tokens", type=positive, default=1024, help="longer ones are cut"
    )
    parser.add_argument("--gpu-budget", metavar="SIZE", help="such as 16GiB")
    parser.add_argument("--cache-ratio", type=fraction, default=0.17, help="without --gpu-budget")
    parser.add_argument("--num-draft-tokens", default="auto", metavar="N|auto")
    parser.add_argument("--results", metavar="FILE", default="paper.jsonl", help="resumed if there")


def run(args: argparse.Namespace) -> Table:
    """One row per benchmark and contender, then the averages over benchmarks."""
    gamma = parse_draft_length(args.num_draft_tokens)
    results = Results(Path(args.results), _settings(args))
    texts = {name: load_prompts(name, args.samples, args.data) for name in args.benchmark}
    model, draft, tokenizer = _load(args)
    prompts = {
        name: [encode(tokenizer, text, args.max_prompt_tokens) for text in found]
        for name, found in texts.items()
    }
    notes = []
    for name in args.contender:
        todo = [
            (benchmark, i)
            for benchmark, found in prompts.items()
            for i in range(len(found))
            if (name, benchmark, i) not in results.lines
        ]
        if not todo:
            continue
        try:
            _contend(args, name, todo, prompts, (model, draft, gamma), results)
        except torch.OutOfMemoryError:
            notes.append(f"{name}: does not fit the GPU")
    notes += [
        f"medians over the samples of a benchmark, greedy, batch 1, at most {args.max_new_tokens} "
        "new tokens; latency is prefill and decoding of a whole text",
        "contenders run one after the other; lru, static: the same kernels, another policy",
        f"same text: as {args.contender[0]}; in bf16 texts may part where two tokens are level",
    ]
    notes += _ratios(results, args)
    return Table(list(COLUMNS), _rows(results, args), "the paper's benchmarks", notes)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What lines of a results file must have in common."""
    names = ("model", "draft", "data", "samples", "max_new_tokens", "max_prompt_tokens")
    more = ("gpu_budget", "cache_ratio", "num_draft_tokens")
    return {name: getattr(args, name) for name in names + more}


class Results:
    """The json lines file: the settings, then one object per generation."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.lines: dict[tuple[str, str, int], dict[str, Any]] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # an interrupted line is made again
        first, *rest = whole.splitlines() or [""]
        try:
            if first and (made := json.loads(first)) != settings:
                others = [name for name in settings if made[name] != settings[name]]
                raise ValueError(f"other {', '.join(others) or 'settings'}")
            for line in map(json.loads, rest):
                self.lines[line["contender"], line["benchmark"], line["sample"]] = line
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--results: {path} is not of a run with these settings ({error}); name another "
                "file"
            ) from error
        self._head = "" if first else json.dumps(settings) + "\n"  # a run that fails leaves no file
        if whole != text:
            path.write_text(whole, encoding="utf-8")

    def add(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(self._head + json.dumps(line) + "\n")
        self._head = ""
        self.lines[line["contender"], line["benchmark"], line["sample"]] = line

    def of(self, contender: str, benchmark: str) -> list[dict[str, Any]]:
        found = self.lines.items()
        return [line for (c, b, _), line in sorted(found) if (c, b) == (contender, benchmark)]


def encode(tokenizer: Any, text: str, limit: int) -> torch.Tensor:
    """int64 [1, n]: the text, cut to `limit` tokens, in the model's chat template if it has one."""
    ids = tokenizer(text).input_ids
    if len(ids) > limit:
        text = tokenizer.decode(ids[:limit], skip_special_tokens=True)
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    return tokenizer(text, return_tensors="pt").input_ids


def _contend(
    args: argparse.Namespace,
    name: str,
    todo: list[tuple[str, int]],
    prompts: dict[str, list[torch.Tensor]],
    parts: tuple[Any, Any, int | str],
    results: Results,
) -> None:
    model, draft, gamma = parts
    how = CONTENDERS[name]
    helper = draft if how.drafts else None
    inside = helper if isinstance(helper, torch.nn.Module) else None
    longest = max(ids.shape[1] for found in prompts.values() for ids in found)
    config = SpacConfig(policy=how.policy, max_length=longest + args.max_new_tokens + 64)
    budget = args.gpu_budget or bytes_for_ratio(model, args.cache_ratio, config, inside)
    if how.resident:
        budget = None
    attach(model, budget, draft=inside, **asdict(config))
    options: dict[str, Any] = {"draft": helper, "num_draft_tokens": gamma if how.drafts else 0}
    options |= {"return_result": True}
    try:
        first = prompts[todo[0][0]][todo[0][1]]
        generate(model, first, max_new_tokens=min(16, args.max_new_tokens), **options)
        for benchmark, sample in progress(todo, name):
            ids = prompts[benchmark][sample]
            before = _pairs(model)
            result = generate(model, ids, max_new_tokens=args.max_new_tokens, **options)
            assert isinstance(result, GenerationResult)
            pairs, hits = (b - a for a, b in zip(before, _pairs(model), strict=True))
            new = result.sequences[0, ids.shape[1] :].tolist()
            results.add(
                {
                    "contender": name,
                    "benchmark": benchmark,
                    "sample": sample,
                    "prompt_tokens": ids.shape[1],
                    "new_tokens": result.new_tokens,
                    "prefill_s": result.prefill_seconds,
                    "decode_s": result.decode_seconds,
                    "drafted": result.drafted,
                    "accepted": result.accepted,
                    "coverage": hits / pairs if pairs else None,
                    "text": hashlib.sha256(json.dumps(new).encode()).hexdigest(),
                }
            )
    finally:
        detach(model)


def _pairs(model: Any) -> tuple[int, int]:
    """(pairs, resident pairs) since attach; without an engine there is nothing to count."""
    state = attachment(model)
    if state is None or state.engine is None:
        return 0, 0
    pairs, resident = state.engine.counters.sum(0).tolist()[:2]
    return pairs, resident


def speed(lines: list[dict[str, Any]]) -> float | None:
    """Median tokens/s of decoding; None if no text had two tokens."""
    rates = [(n["new_tokens"] - 1) / n["decode_s"] for n in lines if n["new_tokens"] > 1]
    return median(rates) if rates else None


def _average(results: Results, contender: str, benchmarks: list[str]) -> float | None:
    """Mean over the benchmarks of their median tokens/s; None where one is missing."""
    speeds = [speed(results.of(contender, benchmark)) for benchmark in benchmarks]
    known = [s for s in speeds if s is not None]
    return fmean(known) if len(known) == len(benchmarks) else None


def _rows(results: Results, args: argparse.Namespace) -> list[list[Any]]:
    rows = []
    for benchmark in args.benchmark:
        ours = speed(results.of("spac", benchmark))
        texts = {n["sample"]: n["text"] for n in results.of(args.contender[0], benchmark)}
        for name in args.contender:
            if lines := results.of(name, benchmark):
                rows.append(_row(benchmark, name, lines, ours, texts))
    ours = _average(results, "spac", args.benchmark)
    for name in args.contender:
        if (rate := _average(results, name, args.benchmark)) is not None:
            ratio = None if ours is None else ours / rate
            helped = "yes" if CONTENDERS[name].drafts else "no"
            rows.append(["average", name, helped, None, rate, ratio, 1e3 / rate, *[None] * 5])
    return rows


def _row(
    benchmark: str,
    name: str,
    lines: list[dict[str, Any]],
    ours: float | None,
    texts: dict[int, str],
) -> list[Any]:
    rate = speed(lines)
    drafted = sum(n["drafted"] for n in lines)
    covered = [n["coverage"] for n in lines if n["coverage"] is not None]
    same = sum(n["text"] == texts.get(n["sample"]) for n in lines)
    return [
        benchmark,
        name,
        "yes" if CONTENDERS[name].drafts else "no",
        len(lines),
        rate,
        ours / rate if ours and rate else None,
        1e3 / rate if rate else None,
        1e3 * median(n["prefill_s"] for n in lines),
        median(n["prefill_s"] + n["decode_s"] for n in lines),
        sum(n["accepted"] for n in lines) / drafted if drafted else None,
        median(covered) if covered else None,
        f"{same}/{len(lines)}",
    ]


def _ratios(results: Results, args: argparse.Namespace) -> list[str]:
    """The paper's two comparisons, where their contenders ran."""
    rates = {name: _average(results, name, args.benchmark) for name in args.contender}
    ours = rates.pop("spac", None)
    known = {n: r for n, r in rates.items() if r is not None and not CONTENDERS[n].resident}
    with_draft = [r for n, r in known.items() if CONTENDERS[n].drafts]
    without = [r for n, r in known.items() if not CONTENDERS[n].drafts]
    notes = []
    if ours and with_draft:
        notes.append(f"spac / best other policy with draft: {ours / max(with_draft):.2f}")
    if ours and without:
        notes.append(f"spac / average without draft: {ours / fmean(without):.2f}")
    return notes
