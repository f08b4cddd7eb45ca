"""Models attached with quantised experts: not the checkpoint's answers, but the same anywhere."""

import pytest
import torch

import spac
from spac.attachment import attachment
from spac.budget import bytes_for_ratio
from spac.config import SpacConfig
from spac.demo_model import load_demo
from spac.experts import expert_parameters, find_experts
from spac.layout import ExpertLayout
from spac.quantize import dequantize, quantize
from spac.store import HostStore

PROMPT = "def fibonacci(n):\n    "
LENGTH = {"max_length": 256}


def round_experts(model, form, group):
    """The model with the weights that quantised ones stand for, in its own dtype."""
    for _, module in find_experts(model):
        plain = expert_parameters(module)
        layout = ExpertLayout(
            plain["gate_up"].shape[0], *plain["down"].shape[1:], torch.float32
        ).quantized(form, group)
        rounded = dequantize(quantize({n: p.data for n, p in plain.items()}, layout), layout)
        for name, parameter in plain.items():
            parameter.data.copy_(rounded[name])


@pytest.mark.parametrize("form, group", [("int8", 0), ("int4", 32)], ids=["int8", "int4"])
def test_offloaded_text_is_that_of_the_rounded_model(form, group, device):
    """Token for token in fp32, whatever lives where, with and without a draft."""
    target, draft, tokenizer = load_demo()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids.to(device)
    settings = LENGTH | {"weights": form}
    config = SpacConfig(**settings)
    texts = {}
    for ratio in (1.0, 0.2):
        spac.attach(target, bytes_for_ratio(target, ratio, config), device=device, **settings)
        for gamma in (0, 3):
            out = spac.generate(
                target, ids, draft="ngram", num_draft_tokens=gamma, max_new_tokens=24,
                do_sample=False,
            )  # fmt: skip
            texts[ratio, gamma] = out[0].tolist()
        store = attachment(target).engine.store
        plain_bytes = sum(
            p.numel() * 4 for _, m in find_experts(target) for p in expert_parameters(m).values()
        )
        assert store.nbytes < plain_bytes * (0.3 if form == "int8" else 0.2)
        spac.detach(target)
        target, _, _ = load_demo()
    assert len({tuple(t) for t in texts.values()}) == 1
    round_experts(target, form, group)
    plain = target.to(device).generate(ids, max_new_tokens=24, do_sample=False)[0].tolist()
    assert plain == texts[1.0, 0]


def test_detach_gives_the_rounded_weights_back(tiny_moe):
    model, rounded = tiny_moe(), tiny_moe()
    round_experts(rounded, "int8", 0)
    spac.attach(model, weights="int8", **LENGTH)
    for _, module in find_experts(model):
        assert (
            module.gate_up_proj.isnan().all() and module.down_proj.untyped_storage().nbytes() <= 4
        )
    ids = torch.randint(0, 96, (1, 9), device=model.device)
    with torch.no_grad():
        got = model(ids).logits.cpu()
        spac.detach(model)
        ids = ids.to(model.device)
        again = model(ids).logits
        torch.testing.assert_close(got, rounded(ids).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(again, rounded(ids).logits, rtol=1e-4, atol=1e-4)


def test_transposed_biased_interleaved_parameters():
    """GPT-OSS's parameters come in, and back, as rows."""
    source = ExpertLayout(3, 64, 32, torch.bfloat16, transposed=True, interleaved=True, bias=True)
    shapes = {"gate_up": (3, 64, 64), "down": (3, 32, 64)}
    shapes |= {"gate_up_bias": (3, 64), "down_bias": (3, 64)}
    parameters = {
        n: torch.nn.Parameter(torch.randn(s).bfloat16(), requires_grad=False)
        for n, s in shapes.items()
    }
    before = {n: p.data.clone() for n, p in parameters.items()}
    store = HostStore([source.quantized("int4")], False, [source])
    store.adopt(parameters)
    store.restore(0, parameters, torch.device("cpu"))
    for name, parameter in parameters.items():
        error = (parameter - before[name]).float().norm() / before[name].float().norm()
        assert parameter.is_contiguous() and error < (1e-6 if "bias" in name else 0.15)


def test_a_failure_leaves_the_weights(tiny_moe):
    model = tiny_moe()
    _, last = find_experts(model)[-1]
    last.down_proj.data[1, 2, 3] = float("inf")
    before = [p.data.clone() for _, m in find_experts(model) for p in expert_parameters(m).values()]
    with pytest.raises(ValueError, match="finite"):
        spac.attach(model, weights="int8", **LENGTH)
    after = [p.data for _, m in find_experts(model) for p in expert_parameters(m).values()]
    assert torch.equal(after[-1], before[-1])  # the layer that failed is untouched
    for a, b in zip(after[:-2], before[:-2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.02)
    with pytest.raises(ValueError, match="weights: expected"):
        spac.attach(model, weights="int3")
