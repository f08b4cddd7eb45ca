"""The bench frame, and each benchmark once in its smallest form."""

import csv
import io
import json

import pytest

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
    for name in ("kernels", "cpu", "verify", "balance", "generate"):
        assert name in out
    found, missing = benchmarks()
    assert not missing, missing


def test_bad_arguments(capsys):
    assert main(["generate", "--repeats", "0"]) == 2
    assert "--repeats: must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["nothing"])
    assert stop.value.code == 2
