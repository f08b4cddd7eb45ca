"""bench paper: a few samples of each data set's format, the run on a small model, resuming."""

import json
import sys

import pytest

from spac.bench import paper
from spac.bench.__main__ import main
from spac.bench.paper_data import SOURCES, load_prompts

RECORDS = {
    "mmlu-pro": {"question_id": 7, "question": "2 + 2?", "options": ["3", "4"], "answer": "B",
                 "answer_index": 1, "cot_content": "", "category": "math", "src": "x"},
    "mt-bench": {"category": "writing", "prompt": ["Write a letter.", "Shorter."],
                 "reference": [], "prompt_id": 3},
    "humaneval": {"task_id": "HumanEval/0", "prompt": "def double(x):\n", "test": "",
                  "canonical_solution": "    return 2 * x\n", "entry_point": "double"},
    "gsm8k": {"question": "Ann has 3 pens and buys 2. How many?", "answer": "5\n#### 5"},
    "alpaca": {"instruction": "Name the colour.", "input": "The sky.", "output": "Blue",
               "text": ""},
    "cnn-dailymail": {"article": "It rained. " * 40, "highlights": "Rain.", "id": "a1"},
    "qa": {"question": "who wrote the book", "answer": ["nobody"]},
}  # fmt: skip
WANTED = {
    "mmlu-pro": "2 + 2?\nA. 3\nB. 4\nAnswer with the letter, and say why.",
    "mt-bench": "Write a letter.",
    "humaneval": "def double(x):\n",
    "gsm8k": "Ann has 3 pens and buys 2. How many?",
    "alpaca": "Name the colour.\n\nThe sky.",
    "cnn-dailymail": "Summarize this article.\n\n" + "It rained. " * 40,
    "qa": "who wrote the book",
}


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, record in RECORDS.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(record))
    return folder


@pytest.mark.parametrize("name", SOURCES)
def test_every_format(data, name):
    assert load_prompts(name, 1, data) == [WANTED[name]]
    assert load_prompts(name, 9, data) == [WANTED[name]] * 2


def test_records_are_spread_evenly_and_json_lists_read(tmp_path):
    records = [{"question": f"q{i}"} for i in range(10)]
    (tmp_path / "qa.json").write_text(json.dumps(records))
    assert load_prompts("qa", 3, tmp_path) == ["q0", "q3", "q6"]
    (tmp_path / "mt-bench.jsonl").write_text(json.dumps({"turns": ["one", "two"]}))
    assert load_prompts("mt-bench", 3, tmp_path) == ["one"]


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "--data: no gsm8k"),
        ("", "gsm8k: no records"),
        ("{", "gsm8k.jsonl: not jsonl"),
        ("[1]", "record 0 is not of the format of openai/gsm8k"),
        ('{"answer": "5"}', "record 0 is not of the format of openai/gsm8k: KeyError"),
        ('{"question": " "}', "record 0 has no text"),
    ],
)
def test_bad_data_is_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "gsm8k.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_prompts("gsm8k", 2, tmp_path)
    assert "\n" not in str(error.value)


def test_by_name_through_datasets(monkeypatch, tmp_path, capsys):
    asked = []

    class Module:
        @staticmethod
        def load_dataset(*arguments, **options):
            asked.append((arguments, options))
            return [RECORDS["gsm8k"]]

    monkeypatch.setitem(sys.modules, "datasets", Module)
    assert load_prompts("gsm8k", 5) == [WANTED["gsm8k"]]
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(["paper", "--results", str(tmp_path / "r.jsonl")]) == 2
    assert not (tmp_path / "r.jsonl").exists()
    error = capsys.readouterr().err
    assert "mmlu-pro: the package datasets is needed" in error and error.count("\n") == 1


class Tokenizer:
    chat_template = None

    def __call__(self, text, **options):
        import torch
        from transformers import BatchEncoding

        ids = [ord(c) % 96 for c in text]
        return BatchEncoding({"input_ids": torch.tensor([ids]) if options else ids})

    def decode(self, ids, skip_special_tokens):
        return "".join(map(chr, ids))


def test_run_resume_and_other_settings(tiny_moe, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paper, "_load", lambda args: (tiny_moe(), "ngram", Tokenizer()))
    file, out = tmp_path / "results.jsonl", tmp_path / "table.json"
    argv = ["paper", "--data", str(data), "--results", str(file), "--samples", "1"]
    argv += ["--max-new-tokens", "5", "--max-prompt-tokens", "40", "--cache-ratio", "0.3"]
    argv += ["--benchmark", "gsm8k", "cnn-dailymail", "-o", "json", "--output", str(out)]
    assert main(argv) == 0
    rows = json.loads(out.read_text())["rows"]
    contenders = list(paper.CONTENDERS)
    assert [(r["benchmark"], r["contender"]) for r in rows] == [
        (b, c) for b in ("gsm8k", "cnn-dailymail", "average") for c in contenders
    ]
    assert all(r["same text"] == "1/1" for r in rows[: 2 * len(contenders)])
    assert all(r["tokens/s"] > 0 and r["ms/token"] > 0 for r in rows)
    whole = file.read_text()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 1 + 2 * len(contenders)

    file.write_text("".join(lines[:-1]) + lines[-1][:20])  # cut while it was written
    assert main(argv) == 0
    assert file.read_text().startswith("".join(lines[:-1]))
    assert len(file.read_text().splitlines()) == len(lines)

    file.write_text(whole)
    monkeypatch.setattr(paper, "generate", None)  # nothing is left to do
    assert main(argv) == 0 and file.read_text() == whole
    assert json.loads(out.read_text())["rows"] == rows
    capsys.readouterr()
    assert main([*argv, "--samples", "2"]) == 2
    assert (
        "is not of a run with these settings (other samples); name another file"
        in capsys.readouterr().err
    )
