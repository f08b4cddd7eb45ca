"""`python -m spac`, as a user types it, on a small saved model."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from spac.__main__ import main
from spac.attachment import attachment
from spac.budget import bytes_for_ratio
from spac.config import SpacConfig, format_bytes
from spac.loading import from_pretrained, load_tokenizer
from spac.status import stats
from spac.testing import fault
from spac.trace import load_trace

PROMPT = ["--prompt", "t1 t2 t3 t1 t2"]
SHORT = ["--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {f"t{i}": i for i in range(96)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0")


@pytest.fixture
def checkpoint(tiny_moe, tokenizer, tmp_path):
    folder = tmp_path / "target"
    tiny_moe().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(capsys, *argv) -> tuple[int, str, str]:
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_generate(checkpoint, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    code, out, _ = run(
        capsys, "generate", "--model", checkpoint, *PROMPT, *SHORT, "--draft", "ngram",
        "--num-draft-tokens", 3, "--cache-ratio", 0.3, "--json", figures,
    )  # fmt: skip
    assert code == 0
    for word in ("tokens/s", "accepted drafts", "coverage", "moved per token", "balancer"):
        assert word in out
    assert "yes" in next(line for line in out.splitlines() if "same text without" in line)
    data = json.loads(figures.read_text())
    assert data["with"]["generation"]["new_tokens"] == 12
    assert data["without"]["drafted"] == 0
    timed = data["timed"]
    assert f"{timed['coverage']:.0%} of pairs" in out and f"({timed['loads']} loads in" in out
    assert format_bytes(timed["bytes_moved"] / 12) in out
    warm = data["with"]["loads"] - timed["loads"]
    assert warm >= data["with"]["budget"]["slots"]  # the first fill and the warm-up are not its own


def test_generate_without_a_budget(checkpoint, capsys):
    code, out, _ = run(capsys, "generate", "--model", checkpoint, *PROMPT, *SHORT)
    assert code == 0 and "tokens/s" in out and "with speculation" not in out


def test_no_share_of_the_experts_is_not_no_budget(checkpoint, capsys):
    code, out, _ = run(
        capsys, "generate", "--model", checkpoint, *PROMPT, *SHORT, "--cache-ratio", 0
    )
    assert code == 0 and ", 1 expert slots" in out


def test_trace(checkpoint, tmp_path, capsys):
    file = tmp_path / "routing.npz"
    code, out, _ = run(capsys, "trace", "--model", checkpoint, *PROMPT, *SHORT, "--output", file)
    assert code == 0 and "3 layers, top-4 of 16" in out
    trace = load_trace(file)
    assert trace.shape == (5 + 11, 3, 4) and trace.model == "Qwen3MoeForCausalLM"
    trace.check_model(3, 16, 4)
    with pytest.raises(ValueError):
        trace.check_model(4, 16, 4)


def test_a_trace_is_of_the_text_whatever_drafts(checkpoint, tmp_path, capsys):
    """No rows of tokens that were drafted and rejected."""
    file, draft = tmp_path / "routing.npz", ("--draft", checkpoint)
    run(capsys, "trace", "--model", checkpoint, *draft, *PROMPT, *SHORT, "--output", file)
    trace = load_trace(file)
    assert trace.boundaries.tolist() == [0, *range(5, 17)]


def test_a_profile_fills_the_slots(checkpoint, tiny_moe, tmp_path, capsys):
    file = tmp_path / "routing.npz"
    run(capsys, "trace", "--model", checkpoint, *PROMPT, *SHORT, "--output", file)
    counts = load_trace(file).counts()
    assert counts.shape == (3, 16) and counts.sum() == 16 * 3 * 4
    budget = bytes_for_ratio(tiny_moe(), 0.25, SpacConfig(max_length=64))
    settings = {"max_length": 64, "policy": "static", "profile": str(file)}
    model = from_pretrained(checkpoint, budget, **settings)
    resident = attachment(model).engine.pool.slot_of >= 0
    assert resident.sum() == 12 and counts[resident].min() >= counts[~resident].max()
    code, out, _ = run(
        capsys, "generate", "--model", checkpoint, *PROMPT, *SHORT, "--cache-ratio", 0.3,
        "--profile", file,
    )  # fmt: skip
    assert code == 0 and "coverage" in out
    tiny_moe(num_experts=8).save_pretrained(checkpoint)
    code, _, err = run(capsys, "generate", "--model", checkpoint, *PROMPT, "--profile", file)
    assert code == 2 and err.count("\n") == 1
    assert "Qwen3MoeForCausalLM has 3 layers x 16 experts, top-4; the model has 3 x 8" in err


def test_a_tokenizer_of_no_folder():
    with pytest.raises(ValueError, match="^/missing/model: no such folder$"):
        load_tokenizer("/missing/model")


def test_from_pretrained_equals_the_saved_model(checkpoint, tiny_moe):
    model = from_pretrained(checkpoint, "8MB", max_length=64)
    assert 0 < stats(model)["budget"]["slots"] <= 48
    ids = torch.randint(0, 96, (1, 11))
    with torch.no_grad():
        got = model(ids.to(model.device)).logits.cpu()
        torch.testing.assert_close(got, tiny_moe()(ids).logits, rtol=1e-4, atol=1e-4)


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def not_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"\x93NUMPY" * 100)


@pytest.mark.parametrize(
    "damage, message",
    [
        (truncated, "truncated or not safetensors"),
        (without_weights, "no .safetensors file"),
        (not_safetensors, "truncated or not safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    ],
    ids=["truncated", "no weights", "not safetensors", "no config"],
)
def test_damaged_checkpoints(checkpoint, capsys, damage, message):
    damage(checkpoint)
    code, _, err = run(capsys, "generate", "--model", checkpoint, *PROMPT)
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["--gpu-budget", "10KB"], "gpu_budget: 9.8 KiB given, "),
        (["--num-draft-tokens", "-1"], "--num-draft-tokens: expected a number >= 0"),
        (["--policy", "magic"], "policy: expected one of"),
    ],
)
def test_bad_options_are_one_line(checkpoint, capsys, options, message):
    code, _, err = run(capsys, "generate", "--model", checkpoint, *PROMPT, *options)
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["--gpu-budget", "much"], "size: expected bytes or text"),
        (["--cache-ratio", "1.5"], "cache-ratio: expected 0 to 1, got 1.5"),
        (["--num-draft-tokens", "65"], 'num_draft_tokens: expected 0..64 or "auto", got 65'),
        (["--num-draft-tokens", "²"], "--num-draft-tokens: expected a number >= 0"),
        (["--max-new-tokens", "0"], "max_new_tokens: must be at least 1, got 0"),
        (["--temperature", "0"], "temperature: must be positive, got 0.0"),
        (["--top-k", "-1"], "top_k: must not be negative, got -1"),
        (["--top-p", "2"], "top_p: expected more than 0 and at most 1, got 2.0"),
        (["--draft", "./missing"], "./missing: no such folder"),
        (["--profile", "missing.npz"], "missing.npz: No such file or directory"),
        (["--prompt-file", "missing.txt"], "missing.txt: No such file or directory"),
        (["--json", "missing/f.json"], "--json: cannot write missing/f.json: no folder missing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_needs_no_model_is_refused_before_one_is_loaded(
    checkpoint, capsys, monkeypatch, options, message
):
    monkeypatch.setattr("spac.loading.load_model", lambda *_, **__: pytest.fail("loaded"))
    prompt = [] if "--prompt-file" in options else PROMPT
    code, _, err = run(capsys, "generate", "--model", checkpoint, *prompt, *options)
    assert code == 2 and message in err and err.count("\n") == 1, err


def test_a_trace_that_cannot_be_written_is_refused_first(checkpoint, tmp_path, capsys):
    code, _, err = run(
        capsys, "trace", "--model", "./missing", *PROMPT, "--output", tmp_path
    )  # fmt: skip
    assert code == 2 and err == f"spac: --output: cannot write {tmp_path}: it is a folder\n"


def test_a_closed_pipe_is_no_error_and_ctrl_c_is_one_line_from_the_start():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "spac.bench", "verify", "--windows", "1"]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "verify ...\n")
    late = "import sys, spac.__main__, spac.bench.__main__; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", late], capture_output=True, text=True)
    assert ended.stdout == "False\n", "what takes seconds to import belongs inside main()"


def test_a_draft_with_another_vocabulary(checkpoint, tiny_moe, tmp_path, capsys):
    tiny_moe(vocab_size=50).save_pretrained(tmp_path / "draft")
    code, _, err = run(
        capsys, "generate", "--model", checkpoint, *PROMPT, "--draft", tmp_path / "draft"
    )
    assert code == 2 and "vocabulary has 50 tokens, the target's 96" in err


def test_a_model_without_experts(tokenizer, tmp_path, capsys):
    config = Qwen3Config(
        vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code, _, err = run(capsys, "generate", "--model", tmp_path, *PROMPT, "--gpu-budget", "1GiB")
    assert code == 2 and "Qwen3ForCausalLM has no Mixture-of-Experts layers" in err


def test_a_prompt_is_needed(checkpoint, capsys):
    code, _, err = run(capsys, "generate", "--model", checkpoint)
    assert code == 2 and "--prompt or --prompt-file" in err


@pytest.mark.parametrize(
    "error, code, message",
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nMore"), 2, "spac: CUDA out of memory."),
        (KeyboardInterrupt(), 130, "spac: interrupted"),
    ],
    ids=["memory", "Ctrl-C"],
)
def test_what_stops_a_generation_is_one_line(checkpoint, capsys, error, code, message):
    with fault("layer", fail=error, after=9):
        got, _, err = run(
            capsys, "generate", "--model", checkpoint, *PROMPT, "--cache-ratio", 0.3
        )  # fmt: skip
    assert (got, err.strip()) == (code, message)


def test_a_defect_keeps_its_traceback(checkpoint):
    with fault("layer", fail=RuntimeError("a defect")), pytest.raises(RuntimeError, match="defect"):
        main(["generate", "--model", str(checkpoint), *PROMPT, "--cache-ratio", "0.3"])
