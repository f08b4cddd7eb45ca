"""The nine model families through `experts_implementation="spac"`, against eager."""

import pytest
import torch
import transformers

import spac.hf  # noqa: F401  (registers "spac")
from spac.experts import UnsupportedLayout, expert_layout, find_experts

COMMON = {
    "vocab_size": 67,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
DEEPSEEK = {
    "moe_intermediate_size": 20,
    "intermediate_size": 36,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_group": 2,
    "topk_group": 2,
    "num_key_value_heads": 4,
}
FAMILIES = {
    "Qwen3Moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "head_dim": 12,
    },
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 36},
    "Olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 20},
    "DeepseekV2": DEEPSEEK | {"topk_method": "greedy"},
    "DeepseekV3": DEEPSEEK,
    "GptOss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 36,
        "head_dim": 12,
    },
    "Qwen2Moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 24,
    },
    "Glm4Moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "intermediate_size": 36,
        "first_k_dense_replace": 1,
        "head_dim": 12,
    },
    "Phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 36},
    "GraniteMoe": {"num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 20},
}


def build(family: str, implementation: str, device: str) -> torch.nn.Module:
    config = getattr(transformers, f"{family}Config")(**COMMON | FAMILIES[family])
    config._experts_implementation = implementation
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for p in model.parameters():  # some families leave their experts uninitialised
        torch.nn.init.normal_(p, std=0.2)
    model.set_experts_implementation(implementation)
    return model.to(device).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_backward_equal_eager(family, device):
    ids = torch.randint(0, COMMON["vocab_size"], (2, 7), device=device)
    outcomes = {}
    for implementation in ("eager", "spac"):
        model = build(family, implementation, device)
        logits = model(input_ids=ids).logits
        logits.square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        outcomes[implementation] = logits.detach(), grads
    logits, grads = outcomes["spac"]
    expected_logits, expected_grads = outcomes["eager"]
    torch.testing.assert_close(logits, expected_logits, rtol=2e-4, atol=2e-4)
    assert grads.keys() == expected_grads.keys()
    assert any("experts" in n for n in grads)
    for name, grad in grads.items():
        scale = expected_grads[name].abs().max().clamp(min=1e-6)
        torch.testing.assert_close(
            grad / scale,
            expected_grads[name] / scale,
            rtol=1e-3,
            atol=1e-3,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_invalid_ids_add_nothing(device):
    model = build("Qwen3Moe", "spac", device)
    _, module = find_experts(model)[0]
    x = torch.randn(4, 48, device=device)
    ids = torch.tensor([[0, 8, -1], [8, 8, 8], [1, 2, 1000], [3, 4, 5]], device=device)
    weights = torch.rand(4, 3, device=device)
    valid = (ids >= 0) & (ids < 8)
    got = module(x, ids, weights)
    expected = module(x, torch.where(valid, ids, 0), torch.where(valid, weights, 0.0))
    assert torch.isfinite(got).all() and (got[1] == 0).all()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_layout_is_recognised():
    _, module = find_experts(build("GptOss", "spac", "cpu"))[0]
    layout = expert_layout(module)
    assert layout.activation == "swiglu_clamp" and layout.transposed
    assert layout.interleaved and layout.bias


def test_unsupported_layouts_are_refused_by_name():
    _, module = find_experts(build("Qwen3Moe", "spac", "cpu"))[0]
    module.act_fn = torch.nn.Tanh()
    with pytest.raises(UnsupportedLayout, match="Qwen3MoeExperts.*gate"):
        expert_layout(module)
    module.has_gate = False
    with pytest.raises(UnsupportedLayout, match="Qwen3MoeExperts.*without a gate"):
        expert_layout(module)


@pytest.mark.parametrize("limit", [30.0, 300.0, 3000.0])
def test_a_clamp_far_out_is_seen(limit):
    _, module = find_experts(build("Qwen3Moe", "spac", "cpu"))[0]

    def gate(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up.clamp(-limit, limit)

    module._apply_gate = gate
    with pytest.raises(UnsupportedLayout, match="its gate is none of"):
        expert_layout(module)


def test_the_refusal_is_one_line():
    _, module = find_experts(build("Qwen3Moe", "spac", "cpu"))[0]
    module.act_fn = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Tanh())
    with pytest.raises(UnsupportedLayout) as refusal:
        expert_layout(module)
    assert "\n" not in str(refusal.value)


def test_layout_follows_the_parameters():
    _, module = find_experts(build("Qwen3Moe", "spac", "cpu"))[0]
    assert expert_layout(module).num_experts == 8
    for name, parameter in list(module.named_parameters()):  # pruned
        setattr(module, name, torch.nn.Parameter(parameter[:6].detach()))
    assert expert_layout(module).num_experts == 6
    assert expert_layout(module.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("first", ["compiled", "eager"])
def test_compiles_whole(first):
    if first == "compiled" and torch.__version__ < "2.12":
        pytest.skip(
            "torch 2.11 cannot read the layout while it compiles; after a forward it need not"
        )
    torch._dynamo.reset()
    model = build("GptOss", "spac", "cpu")
    ids = torch.randint(0, COMMON["vocab_size"], (2, 7))
    if first == "eager":
        model(input_ids=ids)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits = compiled(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
