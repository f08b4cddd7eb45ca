"""The examples of the docs run as they are, and say what their text promises."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"


def run(name, monkeypatch, capsys, *options):
    monkeypatch.setattr(sys, "argv", [name, *options])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_generate_with_offload(monkeypatch, capsys):
    out = run("generate_with_offload.py", monkeypatch, capsys, "--max-new-tokens", "24")
    slots, coverage = re.search(r"(\d+) slots, coverage (\d+)%", out).groups()
    assert 0 < int(slots) < 192 and 0 < int(coverage) < 100


def test_record_and_replay_routing(monkeypatch, capsys):
    out = run("record_and_replay_routing.py", monkeypatch, capsys)
    assert "with replay all agree: True" in out
    assert float(re.search(r"first router: ([\d.]+)", out)[1]) > 0


def test_finetune_with_trainer(monkeypatch, capsys):
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    out = run("finetune_with_trainer.py", monkeypatch, capsys)
    first, last = re.search(r"loss ([\d.]+) -> ([\d.]+) in 6 steps", out).groups()
    assert float(last) < float(first) - 0.5


def test_evaluate_with_lm_eval(monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    out = run("evaluate_with_lm_eval.py", monkeypatch, capsys, "--modules", "bisect")
    assert 0.5 < float(re.search(r"bits_per_byte ([\d.]+)", out)[1]) < 3
    assert int(re.search(r"(\d+) tokens passed", out)[1]) > 100


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes need two GPUs, or none")
def test_expert_parallel():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", str(EXAMPLES / "expert_parallel.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if "requires `accelerate`" in done.stderr:
        pytest.skip("this transformers needs accelerate for parallel plans")
    assert done.returncode == 0, done.stderr[-2000:]
    for process in (0, 1):
        where = f"nccl, cuda:{process}" if torch.cuda.is_available() else "gloo, cpu"
        line = rf"process {process}: 16 of 32 experts, error [\d.e+-]+, {where}"
        assert re.search(line, done.stdout), done.stdout
