"""The identity and soak benchmarks: they pass, and they fail when an answer changes."""

import json

import pytest
import torch

from spac.bench.__main__ import main
from spac.bench.identity import chi_square
from spac.testing import fault

SMALL = ["identity", "--prompts", "1", "--max-new-tokens", "8", "--cache-ratio", "0.2"]
SMALL += ["--num-draft-tokens", "2", "--policy", "spac", "lru", "--threads", "1", "--draws", "12"]


def test_identity_and_what_it_notices(tmp_path):
    file = tmp_path / "figures.json"
    assert main([*SMALL, "-o", "json", "--output", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert sum(row["different"] for row in rows) == 0
    checks = {row["check"].split(",")[0] for row in rows}
    assert checks == {"greedy", "seeded", "distribution", "bf16"}
    with fault("experts", change=lambda out: out * 1.5):
        assert main([*SMALL, "-o", "json", "--output", str(file)]) == 1
    rows = json.loads(file.read_text())["rows"]
    wrong = {row["check"].split(",")[0] for row in rows if row["different"]}
    assert {"greedy", "bf16"} <= wrong


def test_soak(tmp_path):
    file = tmp_path / "figures.json"
    assert main(["soak", "--rounds", "2", "-o", "json", "--output", str(file)]) == 0
    row = json.loads(file.read_text())["rows"][0]
    assert row["rounds"] == 2 and row["tokens"] >= row["generations"] >= 2
    assert row["different"] == row["counters wrong"] == row["threads left"] == 0


@pytest.mark.parametrize(
    "counts, wanted, p",
    [
        ([10, 20], [15, 15], 0.0679),  # 3.33, one degree of freedom
        ([30, 10, 20], [20, 20, 20], 0.00674),  # 10, two
        ([20, 20, 0, 1], [20, 20, 0.5, 0.5], 1.0),  # small classes are one
        ([20, 20, 5], [22, 23, 0], 0.0),  # what cannot come
    ],
)
def test_chi_square(counts, wanted, p):
    got = chi_square(torch.tensor(counts).float(), torch.tensor(wanted).double())
    assert got == pytest.approx(p, rel=1e-2, abs=1e-6)
