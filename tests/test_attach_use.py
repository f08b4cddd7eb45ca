"""What users do to a model while it is attached: right afterwards, or refused in one line."""

import copy
import pickle

import pytest
import torch
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize
from transformers import Qwen3MoeForCausalLM

import spac
from spac.budget import bytes_for_ratio
from spac.config import SpacConfig
from spac.experts import UnsupportedLayout, find_experts

LENGTH = {"max_length": 128}
IDS = torch.tensor([[5, 17, 80, 3, 41]])


class OwnModel(Qwen3MoeForCausalLM):
    """In a file without experts: transformers' set_experts_implementation leaves it alone."""


def attach(model, **settings):
    budget = bytes_for_ratio(model, 0.3, SpacConfig(**LENGTH | settings))
    return spac.attach(model, budget, **LENGTH | settings)


def test_a_class_of_ones_own_is_attached(tiny_moe, monkeypatch):
    # What transformers finds where no other class of the family has been asked before.
    monkeypatch.setattr(
        OwnModel, "_can_set_experts_implementation_cached_value", False, raising=False
    )
    plain = tiny_moe()
    config = copy.deepcopy(plain.config)
    config._experts_implementation = None
    model = OwnModel(config).eval()
    model.load_state_dict(plain.state_dict())
    before = model.config._experts_implementation
    attach(model)
    with torch.no_grad():
        logits = model(IDS.to(model.device)).logits.cpu()
        torch.testing.assert_close(logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)
    assert spac.stats(model)["windows"] == 1
    spac.detach(model)
    assert model.config._experts_implementation == before


def test_models_that_share_a_config(tiny_moe):
    a, b = tiny_moe(), tiny_moe(1)
    b.config = a.config
    for _, module in find_experts(b):
        module.config = a.config
    attach(a)
    attach(b)
    spac.detach(a)
    with torch.no_grad():
        b(IDS.to(b.device))
    assert spac.stats(b)["windows"] == 1
    spac.detach(b)
    assert {m.config._experts_implementation for _, m in find_experts(b)} == {"grouped_mm"}


def test_no_gradient_is_silently_wrong(tiny_moe):
    model = attach(tiny_moe())
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    ids = IDS.to(model.device)
    with pytest.raises(RuntimeError, match="an attached model has no gradients"):
        model(ids)
    with torch.no_grad():
        model(ids)
    spac.detach(model)
    model(IDS).logits.sum().backward()


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_it_cannot_be_copied_saved_or_overwritten(tiny_moe, weights, tmp_path):
    model, other = tiny_moe(), tiny_moe(1).state_dict()
    attach(model, weights=weights)
    for refused in (
        lambda: copy.deepcopy(model),
        lambda: pickle.dumps(model),
        lambda: model.save_pretrained(tmp_path),
        lambda: model.load_state_dict(other),
        lambda: model.load_state_dict(other, assign=True),
    ):
        with pytest.raises(RuntimeError, match=r"spac: .*call spac\.detach"):
            refused()
    dense = {name: weight for name, weight in other.items() if "experts" not in name}
    model.load_state_dict(dense, strict=False)
    if weights == "float":
        model.state_dict()
    else:
        with pytest.raises(RuntimeError, match=r"state_dict: .*call spac\.detach"):
            model.state_dict()
    spac.detach(model)
    model.save_pretrained(tmp_path)
    model.load_state_dict(other)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(IDS).logits, model(IDS).logits)


def test_detach_after_the_model_was_changed(tiny_moe):
    model = attach(tiny_moe())
    model.resize_token_embeddings(100)
    model.adapter = torch.nn.Linear(4, 4)
    projection = model.model.layers[0].self_attn.q_proj
    wrapped = torch.nn.Sequential(projection)  # as adapters do: its parameters have new names
    model.model.layers[0].self_attn.q_proj = wrapped
    with torch.no_grad():
        model(IDS.to(model.device))
    spac.detach(model)
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    model(IDS).logits.sum().backward()
    assert projection.weight.grad is not None


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_adapters_on_expert_weights_are_not_passed_over(tiny_moe):
    model = tiny_moe()
    _, experts = find_experts(model)[1]
    attach(model)
    # As peft does around each forward, for adapters with target_parameters.
    parametrize.register_parametrization(experts, "down_proj", Doubled())
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not apply adapters"):
        model(IDS.to(model.device))
    parametrize.remove_parametrizations(experts, "down_proj", leave_parametrized=False)
    spac.detach(model)
    parametrize.register_parametrization(experts, "down_proj", Doubled())
    with pytest.raises(UnsupportedLayout, match="Qwen3MoeForCausalLM: .*parametrized"):
        attach(model)


def test_torch_compile_leaves_the_experts_out(tiny_moe):
    torch._dynamo.reset()
    model, plain = attach(tiny_moe()), tiny_moe()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        logits = compiled(IDS.to(model.device)).logits.cpu()
        torch.testing.assert_close(logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)
    spac.detach(model)


@pytest.mark.parametrize("wrong", ["model", None, 3], ids=str)
def test_what_is_no_model_is_named(wrong):
    with pytest.raises(
        ValueError, match=f"a transformers model is needed, got {type(wrong).__name__}"
    ):
        spac.attach(wrong)


def test_a_sharded_model_is_named(tiny_moe, tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = tiny_moe()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"sharded \(DTensor\)"):
            attach(model)
    finally:
        torch.distributed.destroy_process_group()


def test_a_wrapped_model_is_named(tiny_moe):
    with pytest.raises(ValueError, match="a transformers model is needed, got Sequential"):
        spac.attach(torch.nn.Sequential(tiny_moe()))


@pytest.mark.parametrize(
    "ids, message",
    [
        ([[1, 2]], "int64 tensor .* got list"),
        (torch.rand(1, 3), "int64 tensor .* got torch.float32"),
        (torch.tensor([[5, 96]]), r"0\.\.95, got 5\.\.96"),
        (torch.tensor([[-1, 5]]), r"0\.\.95, got -1\.\.5"),
        (torch.zeros(1, 0, dtype=torch.int64), "n >= 1"),
    ],
    ids=["list", "float", "too high", "negative", "empty"],
)
def test_wrong_input_ids_are_named(tiny_moe, ids, message):
    with pytest.raises(ValueError, match=f"input_ids: expected .*{message}"):
        spac.generate(tiny_moe(), ids)
