"""The same answer with and without spac: greedy and seeded text, token statistics, bf16 layers.

Exit code 1 if any generation differs, if sampled tokens do not follow the target's distribution
(p < 1e-4), or if a layer in bf16 is more than twice as far from fp32 as the plain model in bf16.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spac.attachment import attach, detach
from spac.bench.arguments import fraction, not_negative, positive
from spac.bench.demo_data import held_out_prompts
from spac.bench.report import Table
from spac.budget import bytes_for_ratio
from spac.config import POLICIES, SpacConfig
from spac.demo_model import load_demo
from spac.progress import progress
from spac.sampling import make_warp
from spac.speculative import generate

NAME = "identity"
HELP = "text with and without spac: budgets x drafts x lengths, policies, threads, sampling, bf16"
COLUMNS = ["check", "experts in slots", "policy", "draft", "gamma", "threads"] + [
    "compared",
    "different",
    "figure",
]
LENGTH = 96
P_VALUE = 1e-4
SAMPLING: dict[str, Any] = {"temperature": 0.9, "top_k": 8, "top_p": 0.95}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=positive, default=20, metavar="N")
    parser.add_argument("--max-new-tokens", type=positive, default=64)
    parser.add_argument("--cache-ratio", type=fraction, nargs="+", default=[0.0, 0.25, 1.0])
    parser.add_argument("--num-draft-tokens", type=not_negative, nargs="+", default=[0, 1, 4, 8])
    parser.add_argument("--policy", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--threads", type=positive, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument(
        "--draws", type=positive, default=400, metavar="N", help="of each chi-square"
    )
    parser.add_argument("--folder", metavar="DIR", help="with target/ and draft/; default: bundled")


def run(args: argparse.Namespace) -> Table:
    """Every budget with every draft and length; one case for each policy and thread count."""
    bench = _Bench(args)
    rows = [bench.texts("greedy", *case) for case in progress(bench.cases(), "greedy")]
    for case in progress(bench.sampled_cases(), "seeded"):
        rows.append(bench.texts("seeded", *case, do_sample=True, seed=7, **SAMPLING))
    for seeded in (True, False):
        rows.append(bench.distribution(seeded, args.draws))
    rows += bench.layers()
    different = sum(row[7] for row in rows)
    notes = [
        "greedy: against transformers' own greedy generation with eager experts",
        "seeded: against spac.generate without draft and without tiers, the same seed",
        "distribution: second new token against its exact distribution; figure: p of a chi-square",
        "bf16: rms distance from the fp32 model, relative to its rms; plain bf16 / spac bf16",
        f"{different} differences",
    ]
    title = f"identity, {len(bench.prompts)} held-out prompts, {args.max_new_tokens} tokens"
    return Table(list(COLUMNS), rows, title, notes, failed=different > 0)


class _Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        folder = Path(args.folder) if args.folder else None
        self.args = args
        self.model, self.draft, self.tokenizer = load_demo(folder=folder)
        self.model.set_experts_implementation("eager")  # outside attach, transformers' own code
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(device)  # sums of a CPU and of a GPU differ in the last bits
        self.prompts = held_out_prompts(self.tokenizer, args.prompts, LENGTH).to(device)
        self.drafts = {"none": None, "ngram": "ngram", "model": self.draft}
        self.expected: dict[str, list[Tensor]] = {
            "greedy": [self._plain(row) for row in progress(self.prompts, "plain")],
            "seeded": [self._ours(row, "none", 0, do_sample=True, seed=7, **SAMPLING)
                       for row in self.prompts],
        }  # fmt: skip

    def cases(self) -> list[tuple[float, str, str, list[int], int]]:
        """(share of experts in slots, policy, draft, gammas, threads)"""
        a = self.args
        base, threads = min(a.cache_ratio, key=lambda r: abs(r - 0.25)), a.threads[0]
        gammas = a.num_draft_tokens
        first = a.policy[0]
        cases = [
            (ratio, first, name, gammas if name != "none" else [0], threads)
            for ratio, name in itertools.product(a.cache_ratio, self.drafts)
        ]
        cases += [(base, policy, "model", gammas[-1:], threads) for policy in a.policy[1:]]
        cases += [
            (base, first, "model", gammas[-1:], n) for n in dict.fromkeys(a.threads) if n != threads
        ]
        return cases

    def sampled_cases(self) -> list[tuple[float, str, str, list[int], int]]:
        return [
            case for case in self.cases() if case[2] != "none" and case[1] == self.args.policy[0]
        ]

    def texts(
        self, check: str, ratio: float, policy: str, name: str, gammas: list[int], threads: int,
        **options: Any,
    ) -> list[Any]:  # fmt: skip
        """One row: generations of every prompt and gamma against the expected text."""
        with self._attached(ratio, policy, name), _threads(threads):
            same = [
                torch.equal(self._ours(row, name, gamma, **options), text)
                for row, text in zip(self.prompts, self.expected[check], strict=True)
                for gamma in gammas
            ]
        lengths = " ".join(map(str, gammas))
        different = len(same) - sum(same)
        return [check, f"{ratio:.0%}", policy, name, lengths, threads, len(same), different, None]

    def distribution(self, seeded: bool, draws: int) -> list[Any]:
        """One row: the second new token's counts, by a chi-square test."""
        prompt = self.prompts[0]
        wanted = self._second_token(prompt) * draws
        counts = torch.zeros_like(wanted)
        torch.manual_seed(0)
        with self._attached(0.25, self.args.policy[0], "model"):
            for draw in progress(range(draws), "distribution"):
                text = self._ours(
                    prompt, "model", 2, max_new_tokens=3, do_sample=True,
                    seed=draw if seeded else None, **SAMPLING,
                )  # fmt: skip
                counts[text[0, LENGTH + 1]] += 1
        p = chi_square(counts, wanted)
        kind = "distribution, seeds" if seeded else "distribution, standard rule"
        policy = self.args.policy[0]
        return [
            kind,
            "25%",
            policy,
            "model",
            "2",
            torch.get_num_threads(),
            draws,
            int(p < P_VALUE),
            p,
        ]

    @torch.no_grad()
    def _second_token(self, prompt: Tensor) -> Tensor:
        """Exact distribution [V] of the token after the next one, under SAMPLING."""
        warp = make_warp(**SAMPLING)
        first = warp(len(prompt), self.model(prompt[None]).logits[0, -1:]).softmax(-1)[0]
        tokens = first.nonzero()[:, 0]
        texts = torch.cat([prompt.expand(len(tokens), -1), tokens[:, None]], dim=1)
        second = warp(len(prompt) + 1, self.model(texts).logits[:, -1]).softmax(-1)
        return (first[tokens, None] * second).sum(0).double()

    @torch.no_grad()
    def layers(self) -> list[list[Any]]:
        """One row a layer, and one for the logits: bf16 with spac and without against fp32."""
        ids = self.prompts[:4, :24]
        exact = _states(self.model, ids)
        model = copy.deepcopy(self.model).to(torch.bfloat16)
        plain = _states(model, ids)
        config = SpacConfig(max_length=LENGTH, max_window=ids.numel())
        attach(model, bytes_for_ratio(model, 0.25, config), **asdict(config))
        ours = _states(model, ids)
        detach(model)
        rows: list[list[Any]] = []
        for i, (e, p, s) in enumerate(zip(exact, plain, ours, strict=True)):
            name = f"bf16, layer {i}" if i < len(exact) - 1 else "bf16, logits"
            a, b = ((x - e).norm() / e.norm() for x in (p, s))
            far = int(not b <= 2 * a)
            figure = f"{a:.2e} / {b:.2e}"
            rows.append([name, "25%", "spac", "none", "0", torch.get_num_threads(), 1, far, figure])
        return rows

    @contextmanager
    def _attached(self, ratio: float, policy: str, name: str) -> Iterator[None]:
        config = SpacConfig(policy=policy, max_length=LENGTH + self.args.max_new_tokens + 32)
        draft = self.draft if name == "model" else None
        budget = bytes_for_ratio(self.model, ratio, config, draft)
        attach(self.model, budget, draft=draft, **asdict(config))
        try:
            yield
        finally:
            detach(self.model)

    def _ours(self, prompt: Tensor, name: str, gamma: int, **options: Any) -> Tensor:
        options = {"max_new_tokens": self.args.max_new_tokens} | options
        out = generate(
            self.model, prompt[None], draft=self.drafts[name], num_draft_tokens=gamma,
            eos_token_id=[], **options,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out.cpu()

    def _plain(self, prompt: Tensor) -> Tensor:
        """transformers' own greedy generation."""
        model, new = self.model, self.args.max_new_tokens
        eos, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
        try:
            ids = prompt[None]
            options = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
            return model.generate(ids, max_new_tokens=new, do_sample=False, **options).cpu()
        finally:
            model.generation_config.eos_token_id = eos


def chi_square(counts: Tensor, wanted: Tensor) -> float:
    """p-value of `counts` under expected counts `wanted`; classes below 5 are pooled."""
    counts, wanted = counts.cpu(), wanted.cpu()
    large = wanted >= 5
    pooled = torch.stack([counts[~large].sum(), wanted[~large].sum()])
    observed = torch.cat([counts[large], pooled[:1]])
    expected = torch.cat([wanted[large], pooled[1:].clamp(min=1e-9)])
    if pooled[1] < 0.5 and pooled[0] == 0:  # nothing was expected there, and nothing came
        observed, expected = observed[:-1], expected[:-1]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor(max(len(observed) - 1, 1), dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic.double() / 2))


def _states(model: Any, ids: Tensor) -> list[Tensor]:
    """Hidden states after every layer, and the logits, in fp64 on the CPU."""
    out = model(ids.to(model.device), output_hidden_states=True, use_cache=False)
    return [t.double().cpu() for t in (*out.hidden_states[1:], out.logits)]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
