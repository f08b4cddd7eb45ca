"""Trains the bundled demo models: `python -m spac.bench.train_demo --out DIR`.

DIR/target and DIR/draft become the package's spac/demo/target and spac/demo/draft; DIR/*.pt holds
what a later run needs to go on. Shapes and rates are `Recipe` in demo_recipe.py.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast

from spac.bench import demo_data as data
from spac.bench.demo_card import card
from spac.bench.demo_eval import load, measure
from spac.bench.demo_loops import (
    Report,
    State,
    optimiser,
    record,
    train_draft,
    train_target,
)
from spac.bench.demo_recipe import SMOKE, Recipe, build, draft_config, target_config

MAX_BYTES = 12_000_000  # target, draft and tokenizer together
TARGET_SHARE = 0.6  # of the time, when both are trained


@dataclass(frozen=True)
class Texts:
    """Tokenizer and the three token streams, on the training device."""

    corpus: data.Corpus
    tokenizer: PreTrainedTokenizerFast
    train: data.Stream
    validation: data.Stream
    held_out: data.Stream


def read(recipe: Recipe, sources: Sequence[Path], out: Path, device: str) -> Texts:
    """Corpus and tokenizer; a tokenizer already in `out` is used again, for its models need it."""
    corpus = data.read_corpus(sources, recipe.files)
    if (out / "target" / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(out / "target")
    else:
        texts = (text for _, text in corpus.train)
        tokenizer = data.train_tokenizer(texts, recipe.vocab, recipe.context)
        tokenizer.save_pretrained(out / "target")
    parts = (corpus.train, corpus.validation, corpus.held_out)
    streams = [data.encode(tokenizer, part).to(device) for part in parts]
    return Texts(corpus, tokenizer, *streams)


def short(stream: data.Stream, recipe: Recipe) -> data.Stream:
    """The first `recipe.evaluated` tokens; their bytes by proportion."""
    if recipe.evaluated is None or recipe.evaluated >= len(stream.tokens):
        return stream
    part = recipe.evaluated / len(stream.tokens)
    return data.Stream(stream.tokens[: recipe.evaluated], stream.starts, round(part * stream.bytes))


def save_best(state: State, folder: Path) -> None:
    """The best weights as a bf16 checkpoint in transformers' format."""
    best = copy.deepcopy(state.model)
    best.load_state_dict(state.best_weights)
    best.to(torch.bfloat16).save_pretrained(folder)


def release_bytes(out: Path) -> int:
    """Bytes of weights, configs and tokenizer. Raises ValueError above MAX_BYTES."""
    files = [f for part in ("target", "draft") for f in (out / part).glob("*") if f.is_file()]
    total = sum(f.stat().st_size for f in files)
    if total > MAX_BYTES:
        raise ValueError(f"{out}: the models take {total} bytes, at most {MAX_BYTES} are allowed")
    return total


def describe(texts: Texts, recipe: Recipe, args: argparse.Namespace) -> dict:
    """How the models came about: data, settings, machine."""
    train = texts.train
    return {
        "recipe": asdict(recipe),
        "precision": "fp32 parameters and optimiser, TF32 products on CUDA, saved as bf16",
        "experts_implementation": args.experts,
        "machine": {
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "data": {
            "libraries": texts.corpus.roots,
            "files": len(texts.corpus.train),
            "bytes": train.bytes,
            "tokens": len(train.tokens),
            "bytes_per_token": round(train.bytes / len(train.tokens), 3),
            "held_out": [n for n, _ in texts.corpus.held_out],
            "validation": [n for n, _ in texts.corpus.validation],
        },
        "licence": {"weights": "Apache-2.0", "data": "PSF-2.0"},
    }


def note(out: Path, **entries: object) -> dict:
    """Adds entries to the metrics in `out`, which grow as the stages go on; returns all of them."""
    path = out / "target" / "metrics.json"
    metrics = json.loads(path.read_text()) if path.exists() else {}
    metrics |= entries
    path.write_text(json.dumps(metrics, indent=1) + "\n")
    return metrics


def make_report(start: float) -> Report:
    """A progress bar on a terminal with rich, else one line for each report."""
    bar = None
    if sys.stdout.isatty():
        try:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            bar = Progress(BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
            bar.start()
            task = bar.add_task("", total=1.0)
        except ImportError:
            pass

    def report(share: float, line: str) -> None:
        if bar is not None:
            bar.update(task, completed=share, description=line)
        else:
            print(f"[{time.monotonic() - start:6.1f} s] {100 * share:5.1f}% {line}", flush=True)

    return report


def run(args: argparse.Namespace, recipe: Recipe) -> dict:
    """Trains the stages asked for and writes args.out. Returns the metrics of a finished pair."""
    start = time.monotonic()
    # The seconds taken off are for the last measurements.
    deadline = start + 60 * args.minutes - min(20, 6 * args.minutes)
    report = make_report(start)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    out, device = args.out, args.device
    texts = read(recipe, args.source, out, device)
    bos, eos = texts.tokenizer.bos_token_id, texts.tokenizer.eos_token_id
    report(0, f"{len(texts.corpus.train)} files, {len(texts.train.tokens)} training tokens")

    def stage(name: str, config: PretrainedConfig, experts: str | None, peak: float) -> State:
        model = build(config, experts).to(device)
        return State(model, optimiser(model, recipe, peak), out / f"{name}.pt").restore()

    def release(state: State) -> None:
        save_best(state, out / state.path.stem)
        command = " ".join(["python", "-m", "spac.bench.train_demo", *args.given])
        entry = {"command": command, "seed": args.seed, **record(state)}
        note(out, **{f"{state.path.stem}_training": entry})

    if args.stage in ("target", "all"):
        left = deadline - time.monotonic()
        seconds = (TARGET_SHARE if args.stage == "all" else 1) * left
        target = stage(
            "target", target_config(recipe, bos, eos), args.experts, recipe.learning_rate
        )
        validation = short(texts.validation, recipe)
        train_target(target, texts.train, validation, recipe, seconds, report, release)
    if args.stage == "target":
        return {}
    if not (out / "target" / "model.safetensors").exists():
        raise FileNotFoundError(f"{out}: no target in it, --stage target makes one")

    draft = stage("draft", draft_config(recipe, bos, eos), None, recipe.draft_learning_rate)
    teacher = load(out / "target", device, args.experts)
    prompts = data.prompts(texts.tokenizer, texts.corpus.validation, 64, 96).to(device)
    seconds = deadline - time.monotonic()
    train_draft(draft, teacher, texts.train, prompts, recipe, seconds, report, release)

    prompts = data.prompts(texts.tokenizer, texts.corpus.held_out, 20, 96).to(device)
    held_out = short(texts.held_out, recipe)
    torch.set_float32_matmul_precision("highest")
    figures = measure(
        out, texts.tokenizer, held_out, prompts, recipe.gamma, recipe.new_tokens, args.experts
    )
    metrics = note(out, **figures, **describe(texts, recipe, args))
    (out / "target" / "README.md").write_text(card(metrics))
    total = release_bytes(out)
    loss, share = figures["held_out_loss"]["nats_per_token"], figures["acceptance"]["share"]
    report(1, f"held-out {loss:.4f} nats a token, accepted {share:.3f}, {total} bytes")
    return metrics


RATES = ("dropout", "learning_rate", "draft_learning_rate", "weight_decay", "balance", "base_share")
SIZES = ("batch", "context", "checks", "rounds", "round_size", "evaluated")  # for a small machine


def parse(argv: Sequence[str]) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(prog="python -m spac.bench.train_demo", description=__doc__)
    add = p.add_argument
    add("--out", type=Path, required=True, help="folder of the results; a run goes on from them")
    add("--minutes", type=float, help="time with reading and measuring (default 9, smoke 1)")
    add("--stage", choices=("target", "draft", "all"), default="all")
    add("--experts", choices=("eager", "grouped_mm", "spac"), default="spac", help="their backend")
    add("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu")
    add("--source", type=Path, action="append", default=[], metavar="DIR",
        help="library folder; may be given again, the first copy of a file wins "
        "(default: the library of this Python)")  # fmt: skip
    add("--seed", type=int, default=0)
    add("--smoke", action="store_true", help="tiny models on a slice of the data")
    for name in RATES:
        add(f"--{name.replace('_', '-')}", type=float, help=f"default {getattr(Recipe, name)}")
    for name in SIZES:
        add(f"--{name.replace('_', '-')}", type=int, help=f"default {getattr(Recipe, name)}")
    add("--threads", type=int, help="CPU threads (default: torch's)")
    args = p.parse_args(argv)
    if args.minutes is None:
        args.minutes = 1.0 if args.smoke else 9.0
    if args.device == "cuda" and not cuda:
        p.error("--device cuda: this machine has no CUDA device")
    args.given = [Path(a).name if a.startswith("/") else a for a in argv]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    precision = torch.get_float32_matmul_precision()
    changed = {n: v for n in RATES + SIZES if (v := getattr(args, n)) is not None}
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        run(args, replace(SMOKE if args.smoke else Recipe(), **changed))
    except (FileNotFoundError, ValueError) as error:
        print(f"train_demo: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_float32_matmul_precision(precision)
    return 0


if __name__ == "__main__":
    sys.exit(main())
