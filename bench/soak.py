"""A long run in miniature: random budgets, policies, drafts and prompts, re-attached for hours.

Exit code 1 if a text differs from the plain model's, if the counters contradict each other, or if
memory grows.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import math
import os
import random
import threading
import time
from typing import Any

import torch

from spac.attachment import attach, attachment, detach
from spac.bench.arguments import positive
from spac.bench.demo_data import held_out_prompts
from spac.bench.report import Table
from spac.budget import bytes_for_ratio
from spac.config import POLICIES, SpacConfig
from spac.demo_model import load_demo
from spac.progress import progress
from spac.speculative import GenerationResult, generate
from spac.status import stats

NAME = "soak"
HELP = "random budgets, policies, drafts and prompts for a long time: text, counters, memory"
# Of prompts. Few, since torch keeps what it has prepared for a matrix shape (oneDNN's primitives,
# about half a megabyte for each new length of a prompt), which is growth, but not a leak.
LENGTHS = (1, 7, 23, 40, 64, 96)
GROWTH = 48 << 20  # bytes that the process, or what is in use of it, may gain after a quarter
COLUMNS = ["rounds", "generations", "tokens", "different", "counters wrong"]
COLUMNS += ["MB, first quarter", "MB, end", "in use, first quarter", "in use, end"]
COLUMNS += ["GPU, first quarter", "GPU, end", "threads left"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=positive, metavar="N", help="attach so often at most")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after this time")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> Table:
    """One row of totals."""
    if not args.minutes > 0:
        raise ValueError(f"--minutes: must be positive, got {args.minutes:g}")
    rng = random.Random(args.seed)
    before = _threads()
    model, draft, tokenizer = load_demo()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)  # sums of a CPU and of a GPU differ in the last bits
    prompts = held_out_prompts(tokenizer, 20, 96).to(device)
    totals = {"rounds": 0, "generations": 0, "tokens": 0, "different": 0, "wrong": 0}
    start = time.monotonic()
    early: list[int] = []
    notes: list[str] = []
    rounds = itertools.count() if args.rounds is None else range(args.rounds)
    for _ in progress(rounds, "soak"):
        config = SpacConfig(
            policy=rng.choice(POLICIES),
            max_length=256,
            rejected_weight=rng.choice((1.0, 0.5)),
            rebalance_every=rng.choice((2, 16)),
            static_windows=rng.choice((None, True)),
            stream_missing=rng.choice((None, True)),
        )
        texts = [
            (prompts[rng.randrange(20), : rng.choice(LENGTHS)][None], rng.randrange(1, 49))
            for _ in range(rng.randrange(1, 4))
        ]
        expected = [_text(model, ids, None, 0, new) for ids, new in texts]
        budget = bytes_for_ratio(model, rng.random() ** 2, config, draft)
        attach(model, budget, draft=draft, **vars(config))
        counted = _Counted(model)
        for (ids, new), plain in zip(texts, expected, strict=True):
            helper = rng.choice((None, "ngram", draft))
            result = _text(model, ids, helper, rng.choice((0, 1, 3, 7, "auto")), new)
            counted.add(ids.shape[1], result)
            totals["generations"] += 1
            totals["tokens"] += result.new_tokens
            totals["different"] += not torch.equal(result.sequences.cpu(), plain.sequences.cpu())
        wrong = counted.contradictions(model)
        totals["wrong"] += len(wrong)
        notes += wrong[: 5 - len(notes)]
        detach(model)
        _release()
        totals["rounds"] += 1
        minutes = (time.monotonic() - start) / 60
        passed = max(minutes / args.minutes, totals["rounds"] / (args.rounds or math.inf))
        last = [resident_bytes(), allocated_bytes(), torch.cuda.memory_reserved()]
        if passed <= 0.25 or not early:
            early = last
        if minutes > args.minutes:
            break
    left = len(_threads() - before)
    grown = any(b > a + GROWTH for a, b in zip(early, last, strict=True))
    failed = bool(totals["different"] or totals["wrong"] or left or grown)
    memory = [n / 1e6 for pair in zip(early, last, strict=True) for n in pair]
    row = [*totals.values(), *memory, left]
    return Table(list(COLUMNS), [row], f"soak, seed {args.seed}", notes, failed=failed)


class _Counted:
    """What the engine's counters must be after the generations of one attachment."""

    def __init__(self, model: Any) -> None:
        state = attachment(model)
        assert state is not None and state.engine is not None
        self.engine = state.engine
        self.windows = self.tokens = self.prefill = 0

    def add(self, prompt: int, result: GenerationResult) -> None:
        self.windows += result.target_forwards
        self.tokens += result.target_forwards + result.drafted
        if prompt > self.engine.config.max_window:
            self.prefill += prompt
        else:
            self.windows += 1
            self.tokens += prompt

    def contradictions(self, model: Any) -> list[str]:
        engine = self.engine
        engine.copier.close()
        layers = len(engine.store.layouts)
        for layer in range(layers):
            engine.pool.publish(layer)
        s = stats(model)
        first = min(s["budget"]["slots"], engine.pool.held.size)
        copies = s["loads"] - s["kept_experts"] - first + engine.pool.doubled
        checks = {
            "windows": (s["windows"], self.windows),
            "pairs": (s["pairs"], self.tokens * layers * engine.top_k),
            "pairs by expert": (int(engine.frequency.sum()), s["pairs"]),
            "prefill tokens": (s["prefill_tokens"], self.prefill),
            "loads - evictions": (s["loads"] - s["evictions"], s["resident"]),
            "bytes copied": (s["bytes_copied"], copies * s["budget"]["slot_bytes"]),
        }
        wrong = [f"{name}: {a} and {b}" for name, (a, b) in checks.items() if a != b]
        if not 0 <= s["resident_pairs"] <= s["pairs"] or s["resident"] > s["budget"]["slots"]:
            wrong.append(f"resident pairs {s['resident_pairs']}, experts {s['resident']}")
        return wrong


def _threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("spac-")}


def _text(model: Any, ids: Any, draft: Any, gamma: int | str, new: int) -> GenerationResult:
    result = generate(
        model, ids, draft=draft, num_draft_tokens=gamma, max_new_tokens=new, eos_token_id=[],
        return_result=True,
    )  # fmt: skip
    assert isinstance(result, GenerationResult)
    return result


def _release() -> None:
    """Give what is free back to the system: only what is still held counts as growth."""
    gc.collect()
    torch.cuda.empty_cache()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc
        trim(0)


def resident_bytes() -> int:
    """Bytes of this process in memory (Linux)."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


_SIZES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _SIZES.split()]


def allocated_bytes() -> int:
    """Bytes in use by callers of malloc, in all threads; 0 without glibc, which alone tells."""
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        return 0
    ask.restype = _Mallinfo2
    info = ask()
    return info.uordblks + info.hblkhd
