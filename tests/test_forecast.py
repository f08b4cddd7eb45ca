"""`python -m spac plan`: predictions from a config alone."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from spac.__main__ import main
from spac.budget import bytes_for_ratio, plan_budget
from spac.config import SpacConfig
from spac.experts import find_experts
from spac.forecast import calibrated, config_model, forecast, machine_costs, step_bytes
from spac.machine import MACHINES
from spac.prefill import PREFILL_CHUNK

LENGTH = SpacConfig(max_length=128)


@pytest.fixture
def folder(tiny_moe, tmp_path):
    config = tiny_moe().config
    config.dtype = "float32"
    config.save_pretrained(tmp_path)  # config.json and nothing else
    return str(tmp_path)


def test_what_was_measured_is_predicted():
    """Qwen3-30B-A3B with top-6 at 17 %, an H200 and an H100: docs/benchmarks.md."""
    from spac.bench.synthetic import SHAPES

    config = Qwen3MoeConfig(
        **SHAPES["qwen3-30b-a3b"], num_hidden_layers=48, num_experts=128, num_experts_per_tok=6
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    costs = machine_costs(model, MACHINES["h200"])
    options = {"draft_token": MACHINES["h200"].draft_token, "acceptance": 0.7}
    found = forecast(model, 13 << 30, costs, **options)
    assert 0.16 < found.share < 0.18
    assert found.without.tokens_per_second == pytest.approx(91, rel=0.1)
    assert (found.best.gamma, found.best.tokens_per_second) == (1, pytest.approx(105, rel=0.15))
    assert found.ttft == pytest.approx(0.37, rel=0.2)


def test_the_budget_is_that_of_the_attached_model(folder, tiny_moe):
    model = config_model(folder)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    real = tiny_moe()
    total = bytes_for_ratio(real, 0.4, LENGTH)
    assert plan_budget(model, total, LENGTH) == plan_budget(real, total, LENGTH)


@pytest.mark.parametrize("machine", MACHINES)
def test_more_memory_is_never_slower(tiny_moe, tmp_path, machine):
    config = tiny_moe().config  # experts large enough that reading them is what takes time
    config.hidden_size, config.moe_intermediate_size = 2048, 768
    config.save_pretrained(tmp_path)
    model = config_model(str(tmp_path))
    costs = machine_costs(model, MACHINES[machine])
    budgets = [bytes_for_ratio(model, r, LENGTH) for r in (0.05, 0.2, 0.5, 1)]
    found = [forecast(model, b, costs, settings=LENGTH, acceptance=0.7) for b in budgets]
    speeds = [f.best.tokens_per_second for f in found]
    # Once the GPU's own experts take longest, CPU and link beside it are missed.
    held = [f.best.missing < 1.2 * f.best.gpu for f in found]
    assert speeds[: held.index(True) + 1] == sorted(speeds[: held.index(True) + 1])
    assert [f.ttft for f in found] == sorted((f.ttft for f in found), reverse=True)
    assert found[-1].coverage == 1 and found[-1].best.missing == pytest.approx(0)
    assert found[-1].best.handoff == 0
    for f in found:
        assert f.best.tokens_per_second >= f.without.tokens_per_second
        assert f.best.seconds >= max(f.best.gpu, f.best.missing) + f.best.dense + f.best.handoff


def test_a_draft_that_is_dear_or_never_right_is_not_used(folder):
    model = config_model(folder)
    costs = machine_costs(model, MACHINES["h200"])
    for options in ({"acceptance": 0.0}, {"acceptance": 0.9, "draft_token": 1.0}):
        assert forecast(model, None, costs, settings=LENGTH, **options).best.gamma == 0
    assert forecast(model, None, costs, settings=LENGTH, acceptance=0.9).best.gamma > 0


def test_this_machine(folder, monkeypatch):
    monkeypatch.setattr("spac.forecast.CALIBRATION_S", 0.2)
    costs = calibrated(config_model(folder))
    assert costs.name == "this machine" and costs.dense_layer > 0 and costs.cpu(8, 8) > 0


def run(capsys, *argv):
    try:
        code = main([str(a) for a in argv])
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err


def test_command_line(folder, tmp_path, capsys):
    options = ("--profile", "laptop", "--max-length", 64, "--draft", folder)
    picture = tmp_path / "p.png"
    plot = ()
    if importlib.util.find_spec("matplotlib"):
        plot = ("--plot", picture)
    code, out, _ = run(
        capsys, "plan", "--model", folder, "--gpu-budget", "9MB", "5MB", *options, *plot
    )
    rows = [line for line in out.splitlines() if "MiB" in line]
    assert code == 0 and len(rows) == 2 and "4.8 MiB" in rows[0] and "8.6 MiB" in rows[1]
    assert "assumed: laptop GPU" in out and "acceptance 0.7" in out
    assert picture.exists() == bool(plot)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--gpu-budget", "10KB"], "gpu_budget: 9.8 KiB given, "),
        (["--gpu-budget", "much"], "size: expected bytes or text"),
        (["--profile", "abacus"], "profile: expected one of h200"),
        (["--acceptance", "2", "--draft", "ngram"], "--acceptance: expected 0 to 1"),
        (["--acceptance", "0.5"], "--acceptance: needs a --draft"),
        (["--prompt-tokens", "0"], "--prompt-tokens: must be at least 1"),
        (["--model", "/none/such"], "/none/such: no such folder"),
        (["--prompt-tokens", "x"], "argument --prompt-tokens: invalid int value"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_errors_are_one_line(folder, capsys, options, message):
    argv = ["--model", folder, "--gpu-budget", "9MB", "--profile", "h200", *options]
    code, _, err = run(capsys, "plan", *argv)
    assert code == 2 and message in err and err.count("\n") == 1, err


def test_every_chunk_of_a_prompt_reads_its_experts(tiny_moe):
    model = tiny_moe()
    costs = machine_costs(model, MACHINES["h200"])
    total = bytes_for_ratio(model, 0.2, LENGTH)

    def ttft(tokens):
        return forecast(model, total, costs, prompt=tokens, settings=LENGTH).ttft

    assert ttft(3 * PREFILL_CHUNK) == pytest.approx(3 * ttft(PREFILL_CHUNK))
    assert ttft(PREFILL_CHUNK + 1) == pytest.approx(ttft(PREFILL_CHUNK) + ttft(1))


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_reads_the_head_but_no_table_of_embeddings(tiny_moe, tied):
    config = tiny_moe().config
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config)
    experts = sum(p.nbytes for _, m in find_experts(model) for p in m.parameters())
    everything = sum(p.nbytes for p in model.parameters())
    table = 0 if tied else model.get_input_embeddings().weight.nbytes
    buffers = sum(b.nbytes for b in model.buffers())
    assert step_bytes(model) == everything + buffers - experts - table
