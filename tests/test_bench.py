"""The bench frame: tables, timing, the list of benchmarks, bad input."""

import csv
import io
import json
import sys

import pytest
import torch

import spac.bench
from spac.bench.__main__ import benchmarks, main
from spac.bench.machine import machine_block, time_cpu
from spac.bench.report import Table, format_cell

TABLE = Table(["name", "us"], [["a", 1.23456], ["b", None]], "title", ["a note"])


def test_table_formats():
    assert "| a | 1.23 |" in TABLE.to_md() and "| b | - |" in TABLE.to_md()
    assert "## title" in TABLE.to_md() and "- a note" in TABLE.to_md()
    assert list(csv.reader(io.StringIO(TABLE.to_csv())))[1] == ["a", "1.23456"]
    data = json.loads(TABLE.to_json())
    assert data["rows"] == [{"name": "a", "us": 1.23456}, {"name": "b", "us": None}]
    assert data["machine"]["torch"]


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="2 columns"):
        Table(["a", "b"], [[1]])


@pytest.mark.parametrize(
    "value, text", [(0.001234, "0.00123"), (123.6, "124"), (None, "-"), ("x", "x"), (7, "7")]
)
def test_format_cell(value, text):
    assert format_cell(value) == text


def test_contenders_take_turns():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "ab"}
    medians = time_cpu(contenders, repeats=3, warmup=1)
    assert calls == list("ab" * 4) and set(medians) == {"a", "b"}


def test_machine_block_names_no_machine():
    import socket

    assert socket.gethostname() not in json.dumps(machine_block())


def test_list(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    for name in ("kernels", "cpu", "tune", "verify", "balance", "generate", "identity", "replay"):
        assert name in out
    found, missing = benchmarks()
    assert not missing, missing


@pytest.mark.parametrize(
    "argv, message",
    [
        (["nothing"], "no benchmark 'nothing'; there are "),
        (["generate", "--repeats", "0"], "--repeats: must be at least 1, got 0"),
        (["generate", "--repeats", "x"], "--repeats: expected a whole number, got 'x'"),
        (["generate", "-o", "pdf"], "invalid choice: 'pdf'"),
        (["generate", "--output", "nowhere/figures.md"], "--output: cannot write nowhere"),
        (["generate", "--nothing"], "unrecognized arguments: --nothing"),
        (["generate", "--trace", "t.npz"], "--trace, --budget: need --shape"),
        (
            ["generate", "--num-draft-tokens", "x"],
            '--num-draft-tokens: expected a number >= 0 or "auto"',
        ),
        (["generate", "--shape", "small", "--layers", "0"], "--layers: must be at least 1, got 0"),
        (["generate", "--shape", "small", "--tokens", "0"], "--tokens: must be at least 1, got 0"),
        (["verify", "--windows", "-1"], "--windows: must be at least 1, got -1"),
        (["verify", "--top-k", "200"], "--top-k: at most --experts, 128, got 200"),
        (["cpu", "--tokens", "0"], "--tokens: must be at least 1, got 0"),
        (["cpu", "--top-k", "200"], "--top-k: at most --experts, 128, got 200"),
        (["cpu", "--isa", "foo"], "--isa: invalid choice: 'foo'"),
        (["kernels", "--plot", "nowhere/p.png"], "--plot: cannot write nowhere/p.png: no folder"),
        (["replay", "x", "--warmup", "1"], "--warmup: must be less than 1"),
        (["replay", "x", "--cache", "2"], "--cache: expected 0 to 1, got 2"),
        (["replay", "x", "--window", "y"], "--window: expected a whole number, got 'y'"),
        (["predict", __file__, "--trace", "x"], "test_bench.py: not JSON: "),
        (["paper", "--results", "nowhere/p.jsonl"], "--results: cannot write nowhere/p.jsonl"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_one_line_and_exit_code_2(argv, message, capsys):
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1, error


@pytest.fixture
def bench_folder(tmp_path, monkeypatch):
    """A folder of benchmark modules in place of the package's own."""
    monkeypatch.setattr(spac.bench, "__path__", [str(tmp_path)])
    yield tmp_path
    for name in [m for m in sys.modules if m.startswith("spac.bench.own_")]:
        del sys.modules[name]


def own_bench(folder, name, start="", failed=False):
    (folder / f"own_{name}.py").write_text(
        f"""{start}
from spac.bench.report import Table
NAME = "{name}"
HELP = "a benchmark of the test"
def add_arguments(parser):
    parser.add_argument("--size", type=int, default=3)
def run(args):
    return Table(["size", "repeats"], [[args.size, args.repeats]], failed={failed})
"""
    )


def test_a_benchmark_is_found_by_its_name_and_run(bench_folder, capsys):
    own_bench(bench_folder, "mine")
    own_bench(bench_folder, "lacking", start="import a_package_that_is_not_installed")
    (bench_folder / "own_helper.py").write_text("raise RuntimeError('not a benchmark')")
    assert main([]) == 0
    listing = capsys.readouterr().out
    assert "mine     a benchmark of the test" in listing and "helper" not in listing
    assert "lacking  not available here: No module named 'a_package_that" in listing

    figures = bench_folder / "figures.json"
    argv = ["mine", "--size", "7", "--repeats", "2", "-o", "json", "--output", str(figures)]
    assert main(argv) == 0
    assert json.loads(figures.read_text())["rows"] == [{"size": 7, "repeats": 2}]

    assert main(["lacking"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("spac.bench: lacking: not available here") and error.count("\n") == 1


def test_a_wrong_result_is_exit_code_1_and_one_line(bench_folder, capsys):
    own_bench(bench_folder, "false", start="from spac.bench.report import WrongResult")
    file = bench_folder / "own_false.py"
    wrong = "raise WrongResult('spac: not equal')\n    return Table"
    file.write_text(file.read_text().replace("return Table", wrong))
    assert main(["false"]) == 1
    assert capsys.readouterr().err == "spac.bench: spac: not equal\n"


def test_a_check_that_does_not_hold_is_exit_code_1(bench_folder, capsys):
    own_bench(bench_folder, "wrong", failed=True)
    assert main(["wrong", "-o", "csv"]) == 1
    assert capsys.readouterr().out == "size,repeats\n3,20\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, windows move experts as well")
def test_figures_of_a_row_are_of_its_own_generations(tmp_path):
    file = tmp_path / "rows.json"
    argv = ["generate", "--prompt", "import re\n" * 20, "--max-new-tokens", "12", "--repeats", "1"]
    argv += ["--policy", "static", "--cache-ratio", "0.25", "--num-draft-tokens", "0", "4"]
    assert main([*argv, "-o", "json", "--output", str(file)]) == 0
    plain, *rows = json.loads(file.read_text())["rows"]
    assert plain["MB/token"] is None and rows[1]["tokens/forward"] > 1
    # Only the prompt moves anything, the same for both, and both make twelve tokens of it.
    assert rows[0]["MB/token"] == rows[1]["MB/token"] > 0
