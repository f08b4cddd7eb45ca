"""Decoder layers in few launches: kernels against torch, whole models against transformers."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from spac import reference
from spac.decoder import can_run, few_launches
from spac.kernels.fused_linear import add_norm, fused_gated, fused_linear
from spac.kernels.route import route
from spac.kernels.window_attention import window_attention

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def poisoned(*shape, dtype, device):
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [(48,), (40, 24), (64, 16, 24)])
@pytest.mark.parametrize("T, K", [(1, 64), (5, 72), (16, 600)])
def test_fused_linear(device, dtype, rows, T, K):
    x = torch.randn(T, K, device=device, dtype=dtype)
    weights = [torch.randn(n, K, device=device, dtype=dtype) / K**0.5 for n in rows]
    wanted = torch.cat([x.double() @ w.double().T for w in weights], dim=1)
    parts = fused_linear(x, weights)
    assert len(parts) == max(1, K // 256) and parts.dtype == torch.float32
    torch.testing.assert_close(parts.sum(0).double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T, K, N", [(1, 64, 32), (3, 40, 24), (16, 80, 17)])
def test_fused_gated(device, dtype, T, K, N):
    x = torch.randn(T, K, device=device, dtype=dtype)
    gate, up = (torch.randn(N, K, device=device, dtype=dtype) / K**0.5 for _ in range(2))
    wanted = torch.nn.functional.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    out = fused_gated(x, gate, up, "silu")
    torch.testing.assert_close(
        out.double(), wanted, rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype]
    )


def test_arguments_that_do_not_fit(device):
    x, w = torch.randn(2, 8, device=device), torch.randn(4, 8, device=device)
    with pytest.raises(ValueError, match=r"x: expected \[1..16, K\]"):
        fused_linear(torch.randn(17, 8, device=device), [w])
    with pytest.raises(ValueError, match="weights: expected up to 3"):
        fused_linear(x, [w[:, :4]])
    with pytest.raises(ValueError, match="parts: expected"):
        add_norm(x, w, w[0], 1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("parts", [None, 1, 3])
def test_add_norm_rounds_as_transformers_does(device, dtype, parts):
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    norm = Qwen3RMSNorm(72, eps=1e-5).to(device, dtype)
    norm.weight.data.normal_()
    x, rest = 3 * torch.randn(5, 72, device=device, dtype=dtype), None
    added = torch.zeros_like(x)
    if parts is not None:
        rest = torch.randn(parts, 5, 72, device=device)
        added = rest.cumsum(0)[-1].to(dtype)
    wanted = x + added
    total, out = add_norm(x, rest, norm.weight, 1e-5)
    # The interpreter cuts off: an ulp of what is added and one of the sum, which may be small.
    ulps = 2**-7 * (added.abs() + wanted.abs()) if dtype == torch.bfloat16 else 1e-2
    assert ((total - wanted).abs() <= ulps).all()
    assert device == "cpu" or torch.equal(total, wanted)
    torch.testing.assert_close(out, norm(total).detach(), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("normalize", [False, True])
def test_route(device, dtype, normalize):
    parts = torch.randint(-9, 10, (2, 9, 24), device=device) / 8  # with equals: the lower id first
    logits = parts.sum(0).to(dtype)
    wanted, ids = reference.route(logits, 5, normalize)
    for rounded in (False, True):
        weights, found = route(parts, 5, normalize, dtype, rounded)
        assert torch.equal(found, ids)
        if rounded:
            assert torch.equal(weights, weights.to(dtype).float())
        torch.testing.assert_close(weights, wanted, rtol=TOLERANCE[dtype], atol=1e-6)


def attention_case(W, heads, kv, D, length, room, dtype, device):
    qkv = torch.randn(2, W, (heads + 2 * kv) * D, device=device)
    angle = torch.rand(W, D // 2, device=device) * 6
    cos, sin = (torch.cat([f(angle)] * 2, 1).to(dtype) for f in (torch.cos, torch.sin))
    caches = [poisoned(kv, room, D, dtype=dtype, device=device) for _ in range(2)]
    for cache in caches:
        cache[:, :length] = torch.randn(kv, length, D, device=device, dtype=dtype)
    return qkv, cos, sin, caches, torch.tensor(length, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "W, heads, kv, D, length",
    [(1, 4, 2, 8, 0), (1, 8, 1, 16, 37), (9, 4, 4, 24, 64), (3, 6, 2, 32, 33), (16, 2, 1, 64, 5)],
)
def test_window_attention(device, dtype, W, heads, kv, D, length, monkeypatch):
    """The cache beyond `length` is poison, and so are the parts: nothing there is read."""
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan"))
    )
    qkv, cos, sin, (keys, values), n = attention_case(
        W, heads, kv, D, length, 96, dtype, torch.device(device)
    )
    norms = [(1 + torch.randn(D, device=device) / 8).to(dtype) for _ in range(2)]
    before = keys.clone(), values.clone()
    out = window_attention(qkv, cos, sin, *norms, 1e-6, keys, values, n, D**-0.5)
    wanted, new_keys, new_values = reference.window_attention(
        qkv.sum(0).to(dtype),
        cos,
        sin,
        *norms,
        1e-6,
        before[0][:, :length],
        before[1][:, :length],
        D**-0.5,
    )
    bound = 1e-5 if dtype == torch.float32 else 5e-2  # the reference does not round q and k
    tolerance = {"rtol": bound, "atol": bound}
    torch.testing.assert_close(out.double(), wanted, **tolerance)
    end = length + W
    torch.testing.assert_close(keys[:, length:end].double(), new_keys, **tolerance)
    torch.testing.assert_close(values[:, length:end].double(), new_values, **tolerance)
    assert torch.equal(keys[:, :length], before[0][:, :length])
    assert keys[:, end:].isnan().all() and values[:, end:].isnan().all()
    torch.testing.assert_close(
        window_attention(qkv, cos, sin, *norms, 1e-6, keys, values, n, D**-0.5), out
    )


def test_window_attention_refuses_other_shapes(device):
    qkv, cos, sin, (keys, values), n = attention_case(2, 4, 2, 8, 3, 9, torch.float32, device)
    with pytest.raises(ValueError, match="qkv: expected"):
        window_attention(qkv[..., 8:], cos, sin, None, None, 0.0, keys, values, n, 1.0)
    with pytest.raises(ValueError, match="keys, values, cos: expected"):
        window_attention(qkv, cos[:1], sin, None, None, 0.0, keys, values, n, 1.0)


SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40}
OTHERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SMALL, num_local_experts=6, num_experts_per_tok=2, sliding_window=None)
    ),
}


@pytest.mark.parametrize("name", ["qwen3_moe", *OTHERS])
@torch.no_grad()
def test_a_model_gives_the_logits_of_transformers(tiny_moe, device, name):
    model = OTHERS[name]() if name in OTHERS else tiny_moe(mlp_only_layers=[1])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model = model.to(device).eval()
    assert can_run(model)
    ids = torch.randint(0, 96, (1, 40), device=device)
    wanted = model(ids).logits[0]
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(ids[:, :21], past_key_values=cache)
    at = 21
    for width in (1, 9, 4, 1):
        lengths = [layer.cumulative_length.clone() for layer in cache.layers]
        with few_launches(model):
            logits = model(
                ids[:, at : at + width], past_key_values=cache,
                position_ids=torch.arange(at, at + width, device=device)[None],
            ).logits[0]  # fmt: skip
        torch.testing.assert_close(logits, wanted[at : at + width], rtol=2e-4, atol=2e-4)
        for layer, length in zip(cache.layers, lengths, strict=True):
            assert layer.cumulative_length == length == at
            layer.cumulative_length += width
        at += width
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_is_not_known_is_left_alone(tiny_moe):
    assert can_run(tiny_moe())
    model = tiny_moe(attention_bias=True)
    assert not can_run(model)
    model = tiny_moe()
    model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *a: None)
    assert not can_run(model)
    model = tiny_moe()
    model.model.layers[0].mlp.gate.forward = lambda hidden: None
    assert not can_run(model)

    model = tiny_moe()
    model.model.norm.register_forward_pre_hook(lambda *a: None)
    assert not can_run(model)

    class Own(torch.nn.Linear):
        pass

    model = tiny_moe()
    model.model.layers[2].self_attn.o_proj = Own(32, 32, bias=False)
    assert not can_run(model)
    assert not can_run(OTHERS["mixtral"]().__class__(MixtralConfig(**SMALL, sliding_window=8)))
