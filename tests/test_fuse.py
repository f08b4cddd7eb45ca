"""Compiled small operations: only inside the context, and with the same logits."""

import pytest
import torch

from spac.fuse import fused


def forwards(model):
    return {name: vars(m).get("forward") for name, m in model.named_modules()}


def test_logits_are_those_of_the_eager_model(tiny_moe):
    model, ids = tiny_moe(mlp_only_layers=[1]), torch.randint(0, 96, (1, 7))
    file = __import__("sys").modules[type(model).__module__]
    rotary, own = file.apply_rotary_pos_emb, forwards(model)
    with torch.no_grad():
        expected = model(ids).logits
        torch._dynamo.utils.counters.clear()
        with fused(model, backend="eager"):
            assert file.apply_rotary_pos_emb is not rotary
            for width in (7, 3, 1):
                torch.testing.assert_close(model(ids[:, :width]).logits, expected[:, :width])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 2
    assert file.apply_rotary_pos_emb is rotary and forwards(model) == own


def test_an_error_inside_leaves_the_model_as_it_was(tiny_moe):
    model = tiny_moe()
    own = forwards(model)
    with pytest.raises(KeyError), fused(model, backend="eager"):
        raise KeyError
    assert forwards(model) == own


def test_a_module_that_somebody_wrapped_is_left_alone(tiny_moe):
    model = tiny_moe()
    norm = model.model.norm
    norm.forward = lambda hidden: hidden * 0
    with fused(model, backend="eager"), torch.no_grad():
        assert not model.model.norm(torch.ones(1, 1, 4)).any()
    assert "forward" in vars(norm)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="inductor's kernels are for a GPU")
def test_inductor_rounds_as_eager_does(tiny_moe):
    model = tiny_moe().to("cuda", torch.bfloat16)
    hidden = torch.randn(1, 9, model.config.hidden_size, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model.model.norm(hidden)
        with fused(model):
            actual = model.model.norm(hidden)
    assert (actual != expected).float().mean() < 0.02  # a sum that fell on the other side
    torch.testing.assert_close(actual, expected)
