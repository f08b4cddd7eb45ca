"""Gradients of the Triton expert FFN against autograd through the reference in fp64."""

import pytest
import torch

from spac import ops, reference
from spac.layout import ExpertLayout

CASES = {  # T, k, E, H, I, options
    "plain": (7, 2, 3, 33, 20, {}),
    "one expert takes all": (40, 1, 3, 16, 16, {}),
    "gpt-oss": (
        6, 2, 3, 34, 18,
        dict(activation="swiglu_clamp", alpha=1.7, limit=2.0, bias=True)
        | dict(transposed=True, interleaved=True),
    ),
    "transposed": (5, 2, 4, 18, 34, dict(transposed=True)),
    "bias": (5, 2, 3, 20, 17, dict(bias=True, activation="gelu")),
    "gelu_tanh": (5, 1, 2, 16, 16, dict(activation="gelu_tanh")),
    "relu interleaved": (5, 2, 2, 17, 16, dict(activation="relu", interleaved=True)),
}  # fmt: skip


def problem(T, k, E, H, inter, options, device, dtype):
    torch.manual_seed(T * E)
    bias = options.get("bias", False)
    gate_up = torch.randn(E, 2 * inter, H) / H**0.5
    down = torch.randn(E, H, inter) / inter**0.5
    if options.get("transposed"):
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    tensors = {
        "x": torch.randn(T, H),
        "weights": torch.rand(T, k),
        "gate_up": gate_up,
        "down": down,
    }
    if bias:
        tensors |= {"gate_up_bias": torch.randn(E, 2 * inter), "down_bias": torch.randn(E, H)}
    ids = torch.randint(0, max(E - 1, 1), (T, k))  # the last expert is never chosen
    ids[0, 0] = -1
    if T > 2:
        ids[1, -1], ids[2, 0] = E, 1000
    if T == 40:
        ids[:] = 1
    tensors = {name: t.to(device=device, dtype=dtype) for name, t in tensors.items()}
    layout = ExpertLayout(E, H, inter, torch.float32, **options)
    return tensors, ids.to(device), torch.randn(T, H).to(device=device, dtype=dtype), layout


def gradients(forward, tensors, dy):
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    forward(leaves).backward(dy)
    return {name: t.grad for name, t in leaves.items()}


@pytest.mark.parametrize("name", CASES)
def test_gradients(name, device):
    *shape, options = CASES[name]
    dtype = torch.float32
    tensors, ids, dy, layout = problem(*shape, options, device, dtype)
    flags = {k: v for k, v in options.items() if k != "bias"}

    def ours(t):
        biases = t.get("gate_up_bias"), t.get("down_bias")
        return ops.expert_ffn(
            t["x"], ids, t["weights"], t["gate_up"], t["down"], *biases, backend="triton", **flags
        )

    def truth(t):
        biases = t.get("gate_up_bias"), t.get("down_bias")
        return reference.expert_ffn(
            t["x"], ids, t["weights"], t["gate_up"], t["down"], layout, *biases
        )

    exact = {n: t.double() for n, t in tensors.items()}
    expected = gradients(truth, exact, dy.double())
    plain = gradients(truth, tensors, dy)
    got = gradients(ours, tensors, dy)
    assert got.keys() == expected.keys()
    for key, grad in got.items():
        assert grad.shape == tensors[key].shape and torch.isfinite(grad).all()
        scale = expected[key].abs().max()
        error = (grad - expected[key]).abs().max() / scale
        allowed = 2 * (plain[key] - expected[key]).abs().max() / scale
        assert error <= max(allowed, 2e-6), key


def test_reference_backward_is_autograd(device):
    """`reference.expert_ffn_backward`, which the CPU backend uses, is the gradient itself."""
    for *shape, options in CASES.values():
        tensors, ids, dy, layout = problem(*shape, options, device, torch.float64)

        def truth(t, ids=ids, layout=layout):
            biases = t.get("gate_up_bias"), t.get("down_bias")
            return reference.expert_ffn(
                t["x"], ids, t["weights"], t["gate_up"], t["down"], layout, *biases
            )

        expected = gradients(truth, tensors, dy)
        args = [tensors[n] for n in ("weights", "gate_up", "down")]
        biases = tensors.get("gate_up_bias"), tensors.get("down_bias")
        got = reference.expert_ffn_backward(dy, tensors["x"], ids, *args, layout, *biases)
        for grad, want in zip(got, expected.values(), strict=True):
            torch.testing.assert_close(grad, want)


def test_repeated_gradients_are_the_same_bits(device):
    *shape, options = CASES["gpt-oss"]
    tensors, ids, dy, _ = problem(*shape, options, device, torch.float32)
    flags = {k: v for k, v in options.items() if k != "bias"}

    def ours(t):
        return ops.expert_ffn(t["x"], ids, *list(t.values())[1:], backend="triton", **flags)

    first, second = gradients(ours, tensors, dy), gradients(ours, tensors, dy)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_opcheck(device):
    tensors, ids, _, _ = problem(5, 2, 3, 16, 16, {}, device, torch.float32)
    t = {n: v.requires_grad_() for n, v in tensors.items()}
    args = (t["x"], ids, t["weights"], t["gate_up"], t["down"], None, None)
    options = ("silu", 0.0, 0.0, False, False, "triton" if device == "cuda" else "cpu")
    torch.library.opcheck(torch.ops.spac.expert_ffn, (*args, *options))
