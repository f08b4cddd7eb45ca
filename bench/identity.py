"""Greedy text with spac against the same model's plain greedy generation, token for token."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from spac.attachment import attach, detach
from spac.bench.demo_data import held_out_prompts
from spac.bench.report import Table
from spac.budget import bytes_for_ratio
from spac.config import SpacConfig
from spac.demo_model import load_demo
from spac.progress import progress
from spac.speculative import generate

NAME = "identity"
HELP = "greedy text with and without spac over held-out prompts: budgets x drafts x draft lengths"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=int, default=20, metavar="N")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--cache-ratio", type=float, nargs="+", default=[0.0, 0.25, 1.0])
    parser.add_argument("--num-draft-tokens", type=int, nargs="+", default=[0, 1, 4, 8])
    parser.add_argument("--policy", nargs="+", default=["spac"])
    parser.add_argument("--folder", metavar="DIR", help="with target/ and draft/; default: bundled")


def run(args: argparse.Namespace) -> Table:
    """One row per budget, policy and draft; `failed` if any token differs."""
    model, draft, tokenizer = load_demo(folder=Path(args.folder) if args.folder else None)
    prompts = held_out_prompts(tokenizer, args.prompts, 96)
    plain = [_plain(model, row[None], args.max_new_tokens) for row in progress(prompts, "plain")]
    rows: list[list[Any]] = []
    cases = [(r, p) for r in args.cache_ratio for p in args.policy]
    for ratio, policy in progress(cases, "spac"):
        config = SpacConfig(policy=policy, max_length=96 + args.max_new_tokens + 32)
        attach(model, bytes_for_ratio(model, ratio, config, draft), draft=draft, **asdict(config))
        for name, helper in (("none", None), ("ngram", "ngram"), ("model", draft)):
            gammas = [0] if helper is None else args.num_draft_tokens
            same = [
                torch.equal(_ours(model, row[None], helper, gamma, args.max_new_tokens), text)
                for row, text in zip(prompts, plain, strict=True)
                for gamma in gammas
            ]
            gamma_text = " ".join(map(str, gammas))
            rows.append([f"{ratio:.0%}", policy, name, gamma_text, sum(same), len(same)])
        detach(model)
    different = sum(row[5] - row[4] for row in rows)
    return Table(
        ["experts in slots", "policy", "draft", "gamma", "identical", "generations"],
        rows,
        f"greedy identity in fp32, {len(prompts)} held-out prompts, {args.max_new_tokens} tokens",
        [f"{different} generations differ from the model's plain greedy text"],
        failed=different > 0,
    )


def _ours(model: Any, ids: torch.Tensor, draft: Any, gamma: int, new: int) -> torch.Tensor:
    out = generate(
        model, ids, draft=draft, num_draft_tokens=gamma, max_new_tokens=new, eos_token_id=[]
    )
    assert isinstance(out, torch.Tensor)
    return out.cpu()


def _plain(model: Any, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """transformers' own greedy generation with eager experts."""
    before = model.config._experts_implementation
    model.set_experts_implementation("eager")
    eos, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        return model.generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    finally:
        model.generation_config.eos_token_id = eos
        model.set_experts_implementation(before)
