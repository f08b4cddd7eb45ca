"""Speculative generation end to end, spac beside the same model without speculation."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch

from spac.attachment import attach, detach
from spac.bench import full_size
from spac.bench.arguments import fraction, positive
from spac.bench.report import Table
from spac.budget import bytes_for_ratio
from spac.config import POLICIES, SpacConfig
from spac.demo_model import load_demo
from spac.draft_length import parse_draft_length
from spac.loading import load_model, load_tokenizer
from spac.progress import progress
from spac.speculative import GenerationResult, generate
from spac.status import between, stats

NAME = "generate"
HELP = "tokens/s of speculative generation: draft lengths x cache ratios, the text checked"
COLUMNS = ["experts", "draft", "gamma", "tokens/s", "x plain", "accepted", "tokens/forward"] + [
    "coverage",
    "MB/token",
    "prefill ms",
    "same text",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PATH", help="default: the bundled model")
    parser.add_argument("--draft", metavar="PATH|ngram|none",
                        help="default: the bundled draft, ngram with --model")  # fmt: skip
    parser.add_argument("--cache-ratio", type=fraction, nargs="+", help="default: 0.25 0.5")
    parser.add_argument("--num-draft-tokens", nargs="+", help="default: 0 4 auto")
    parser.add_argument("--max-new-tokens", type=positive, default=128)
    parser.add_argument("--policy", choices=POLICIES, default="spac")
    parser.add_argument("--prompt", default="import re\n\n\ndef parse(text):\n    ")
    full_size.add_arguments(parser)


def run(args: argparse.Namespace) -> Table:
    """One row per cache ratio and draft length: the median of at most 3 generations.

    With --shape instead the providers of `full_size` at full model size.
    """
    if args.shape is not None:
        return full_size.run(args)
    if args.trace is not None or args.budget is not None:
        raise ValueError("--trace, --budget: need --shape; --cache-ratio is for real models")
    gammas = [parse_draft_length(text) for text in args.num_draft_tokens or ["0", "4", "auto"]]
    model, draft, tokenizer = _load(args)
    ids = tokenizer(args.prompt, return_tensors="pt").input_ids
    rows: list[list[Any]] = []
    plain, expected, _ = _median(args, model, ids, None, 0)
    rows.append(_row("plain model", "none", None, plain, plain, None, "yes"))
    name = "ngram" if draft == "ngram" else "model"
    for ratio in progress(args.cache_ratio or [0.25, 0.5], "generate"):
        helper = draft if isinstance(draft, torch.nn.Module) else None
        config = SpacConfig(policy=args.policy, max_length=ids.shape[1] + args.max_new_tokens + 32)
        attach(model, bytes_for_ratio(model, ratio, config, helper), draft=helper, **asdict(config))
        for gamma in gammas:
            before = stats(model)
            result, sequences, tokens = _median(args, model, ids, draft, gamma)
            figures = between(before, stats(model)) | {"tokens": tokens}
            same = "yes" if sequences == expected else "no"
            label = "none" if gamma == 0 or draft is None else name
            rows.append(_row(f"{ratio:.0%} in slots", label, gamma, result, plain, figures, same))
        detach(model)
    notes = [
        f"{args.max_new_tokens} new tokens, greedy, policy {args.policy}; the rows of a share run "
        "one after the other in one attachment; bytes are of prefill too",
        "plain model: the same weights on one device without spac's tiers and without draft",
    ]
    return Table(list(COLUMNS), rows, "speculative generation", notes)


def _load(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    if args.model is None:
        model, draft, tokenizer = load_demo()
    else:
        model = load_model(args.model, experts_implementation="spac")
        tokenizer, draft = load_tokenizer(args.model), "ngram"
    if args.draft is not None:
        draft = {"none": None, "ngram": "ngram"}.get(args.draft, args.draft)
        if draft not in (None, "ngram"):
            draft = load_model(args.draft)
    return model, draft, tokenizer


def _median(
    args: argparse.Namespace, model: Any, ids: torch.Tensor, draft: Any, gamma: int | str
) -> tuple[GenerationResult, list[list[int]], int]:
    """The median generation, its ids, and the new tokens of all that were run."""
    results: list[GenerationResult] = []
    for _ in range(min(args.repeats, 3)):
        result = generate(
            model,
            ids,
            draft=draft,
            num_draft_tokens=gamma,
            max_new_tokens=args.max_new_tokens,
            return_result=True,
        )
        assert isinstance(result, GenerationResult)
        results.append(result)
    result = sorted(results, key=lambda r: r.tokens_per_second)[len(results) // 2]
    return result, result.sequences.tolist(), sum(r.new_tokens for r in results)


def _row(
    experts: str,
    draft: str,
    gamma: int | str | None,
    result: GenerationResult,
    plain: GenerationResult,
    figures: dict[str, Any] | None,
    same: str,
) -> list[Any]:
    moved = None
    if figures is not None:
        moved = figures["bytes_moved"] / figures["tokens"] / 1e6
    return [
        experts,
        draft,
        gamma,
        result.tokens_per_second,
        result.tokens_per_second / plain.tokens_per_second,
        result.acceptance if result.drafted else None,
        result.tokens_per_forward,
        None if figures is None else figures["coverage"],
        moved,
        result.prefill_seconds * 1e3,
        same,
    ]
