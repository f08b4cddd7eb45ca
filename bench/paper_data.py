"""The seven benchmarks of the paper: where their records are, and the prompt of a record.

Records come from local files (json lines, json, csv, parquet) or, by name, through `datasets`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """A data set on the Hugging Face hub, and how one of its records becomes a prompt."""

    path: str
    config: str | None
    split: str
    prompt: Callable[[Record], str]


def _multiple_choice(record: Record) -> str:
    options = [f"{chr(ord('A') + i)}. {text}" for i, text in enumerate(record["options"])]
    return "\n".join([record["question"], *options, "Answer with the letter, and say why."])


def _first_turn(record: Record) -> str:
    turns = record["turns"] if "turns" in record else record["prompt"]
    return turns if isinstance(turns, str) else turns[0]


def _code(record: Record) -> str:
    return record["prompt"]


def _question(record: Record) -> str:
    return record["question"]


def _instruction(record: Record) -> str:
    return "\n\n".join(filter(None, [record["instruction"], record.get("input")]))


def _summary(record: Record) -> str:
    return f"Summarize this article.\n\n{record['article']}"


SOURCES = {
    "mmlu-pro": Source("TIGER-Lab/MMLU-Pro", None, "test", _multiple_choice),
    "mt-bench": Source("HuggingFaceH4/mt_bench_prompts", None, "train", _first_turn),
    "humaneval": Source("openai/openai_humaneval", None, "test", _code),
    "gsm8k": Source("openai/gsm8k", "main", "test", _question),
    "alpaca": Source("tatsu-lab/alpaca", None, "train", _instruction),
    "cnn-dailymail": Source("abisee/cnn_dailymail", "3.0.0", "test", _summary),
    "qa": Source("google-research-datasets/nq_open", None, "validation", _question),
}
_KINDS = (".jsonl", ".json", ".csv", ".parquet")


def load_prompts(name: str, samples: int, folder: str | Path | None = None) -> list[str]:
    """Up to `samples` prompts of benchmark `name`, evenly spread over its records.

    folder: with NAME.jsonl, .json, .csv or .parquet; None: by name through `datasets`. Raises
    ValueError in one line: no file, no `datasets`, a record that lacks a field.
    """
    source = SOURCES[name]
    records = _from_hub(name, source) if folder is None else _from_folder(name, Path(folder))
    if not len(records):
        raise ValueError(f"{name}: no records")
    count = min(samples, len(records))
    prompts = []
    for place in (i * len(records) // count for i in range(count)):
        try:
            prompt = source.prompt(records[place])
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{name}: record {place} is not of the format of {source.path}: "
                f"{type(error).__name__} {error}"
            ) from error
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{name}: record {place} has no text")
        prompts.append(prompt)
    return prompts


def _from_folder(name: str, folder: Path) -> Sequence[Record]:
    file = next((f for kind in _KINDS if (f := folder / f"{name}{kind}").is_file()), None)
    if file is None:
        raise ValueError(f"--data: no {name}{{{','.join(_KINDS)}}} in {folder}")
    if file.suffix in (".csv", ".parquet"):
        return _load(name, file.suffix[1:], data_files=str(file), split="train")
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            found = json.loads(text)
        else:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not {file.suffix[1:]}: {error}") from error
    if not isinstance(found, list):
        raise ValueError(f"{file}: expected a list of records, got {type(found).__name__}")
    return found


def _from_hub(name: str, source: Source) -> Sequence[Record]:
    return _load(name, source.path, source.config, split=source.split)


def _load(name: str, *arguments: Any, **options: Any) -> Sequence[Record]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"{name}: the package datasets is needed: pip install datasets, or give json lines "
            "in a folder with --data"
        ) from error
    try:
        return load_dataset(*arguments, **options)
    except Exception as error:  # its readers and the network raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{name}: cannot load {arguments[0]}: {reason}") from error
