"""Every gradient of the expert FFN against autograd in fp64."""

from dataclasses import replace

import pytest
import torch

from spac import reference
from spac.kernels.config import FFNConfig, Tile
from spac.kernels.expert_ffn import expert_ffn_train
from spac.kernels.expert_ffn_backward import expert_ffn_backward
from spac.layout import ACTIVATIONS, ExpertLayout, ExpertTable

SMALL = FFNConfig("grouped", Tile(32, 16, 32, 4, 3), Tile(32, 32, 32, 4, 3), Tile(32, 32, 16, 4, 3))
DESCRIPTORS = FFNConfig(
    "descriptors", Tile(32, 16, 32, 4, 3, 16), Tile(32, 32, 32, 4, 3, 16), Tile(16, 32, 16, 4, 3),
    Tile(32, 16, 32, 4, 3),
)  # fmt: skip
NAMES = ("x", "weights", "gate_up", "down", "gate_up_bias", "down_bias")
GPT_OSS = {
    "transposed": True,
    "interleaved": True,
    "bias": True,
    "activation": "swiglu_clamp",
    "alpha": 1.702,
    "limit": 1.0,
}


def parameters(layout: ExpertLayout, device: str) -> list[torch.Tensor]:
    E, H, inter = layout.num_experts, layout.hidden, layout.intermediate
    shapes = [(E, 2 * inter, H), (E, H, inter)]
    if layout.transposed:
        shapes = [(e, b, a) for e, a, b in shapes]
    if layout.bias:
        shapes += [(E, 2 * inter), (E, H)]
    return [(torch.randn(s, device=device) * 0.4).to(layout.dtype) for s in shapes]


def problem(layout, tokens, top_k, device):
    x, dy = (torch.randn(tokens, layout.hidden, device=device).to(layout.dtype) for _ in range(2))
    ids = torch.rand(tokens, layout.num_experts, device=device).argsort(-1)[:, :top_k]
    return x, ids.to(torch.int32), torch.rand(tokens, top_k, device=device), dy


def truth_of(x, ids, weights, dy, params, layout):
    leaves = [t.double().requires_grad_() for t in (x, weights, *params)]
    y = reference.expert_ffn(leaves[0], ids, leaves[1], *leaves[2:4], layout, *leaves[4:])
    return y, torch.autograd.grad(y, leaves, dy.double())


def check(x, ids, weights, dy, params, layout, config=SMALL, table=None, seen=None):
    """At most twice the error of the reference in the dtype of the problem."""
    table = table or ExpertTable.from_parameters(layout, *params)
    y, saved = expert_ffn_train(x, ids, weights, table, config)
    seen = ids if seen is None else seen
    y_truth, truth = truth_of(x, seen, weights, dy, params, layout)
    eps = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-22}[layout.dtype]
    assert (y.double() - y_truth).norm() <= 4 * eps * y_truth.norm()
    grads = expert_ffn_backward(
        dy, x, ids, weights, table, *params, *[None] * (4 - len(params)), saved, config
    )
    for name, grad, tensor, exact in zip(NAMES, grads, (x, weights, *params), truth, strict=False):
        assert grad.shape == tensor.shape and grad.dtype == tensor.dtype, name
        error = (grad.double() - exact).norm() / exact.norm().clamp(min=1e-30)
        assert error <= 4 * eps, f"{name}: {error:.2e}"
    return grads


def quiet_limit(x, params, layout) -> ExpertLayout:
    """The layout with a clamp that no value is near: the gradient jumps there."""
    gate_up = params[0].mT if layout.transposed else params[0]
    pre = torch.einsum("th,enh->ten", x.double(), gate_up.double()) + params[2].double()
    values = pre.abs().flatten().sort().values
    values = values[(values > 0.8) & (values < 1.6)]
    gap = (values[1:] - values[:-1]).argmax()
    return replace(layout, limit=float(values[gap] + values[gap + 1]) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"interleaved": True, "bias": True}, GPT_OSS], ids=["plain", "bias", "gpt_oss"]
)
def test_gradients(options, dtype, device):
    torch.manual_seed(0)
    layout = ExpertLayout(4, 40, 24, dtype, **options)
    x, ids, weights, dy = problem(layout, 9, 2, device)
    params = parameters(layout, device)
    if layout.activation == "swiglu_clamp":
        layout = quiet_limit(x, params, layout)
    check(x, ids, weights, dy, params, layout)


@pytest.mark.parametrize(
    "activation", [a for a in ACTIVATIONS if a not in ("silu", "swiglu_clamp")]
)
def test_activations(activation, device):
    torch.manual_seed(1)
    layout = ExpertLayout(2, 16, 8, torch.float32, activation=activation)
    x, ids, weights, dy = problem(layout, 5, 1, device)
    check(x, ids, weights, dy, parameters(layout, device), layout)


def test_unused_absent_and_invalid_get_zeros(device):
    torch.manual_seed(2)
    layout = ExpertLayout(5, 33, 17, torch.float32, bias=True)
    params = parameters(layout, device)
    x, ids, weights, dy = problem(layout, 8, 3, device)
    ids[ids == 1] = -1  # expert 1 has no token
    ids[0, 0], ids[1] = 5, 2**31 - 1
    table = ExpertTable.from_parameters(layout, *params)
    address = table.address.clone()
    address[3] = 0
    seen = torch.where(ids == 3, -1, ids)
    # The gradient of an absent expert is the sum over its tokens all the same: it is unused here.
    table = replace(table, address=address)
    dx, dw, d_gate_up, d_down, *biases = expert_ffn_backward(
        dy, x, seen, weights, table, *params, config=SMALL
    )
    _, truth = truth_of(x, seen, weights, dy, params, layout)
    for grad, exact in zip((dx, dw, d_gate_up, d_down, *biases), truth, strict=True):
        torch.testing.assert_close(grad.double(), exact, rtol=1e-4, atol=1e-5)
    assert not dw[1].any() and not dx[1].any()
    for grad in (d_gate_up, d_down, *biases):
        assert not grad[1].any() and not grad[3].any()


def test_one_expert_takes_all_and_strided_parameters(device):
    torch.manual_seed(3)
    layout = ExpertLayout(3, 32, 16, torch.float32)
    wide = [torch.randn(3, 32, 40, device=device), torch.randn(3, 40, 16, device=device)]
    params = [wide[0][:, :, :32], wide[1][:, 4:36]]
    x, ids, weights, dy = problem(layout, 40, 1, device)
    check(x, torch.full_like(ids, 1), weights, dy, params, layout)


def test_without_saved_and_by_default_configuration(device):
    torch.manual_seed(4)
    layout = ExpertLayout(2, 64, 32, torch.float16)
    params = parameters(layout, device)
    x, ids, weights, dy = problem(layout, 6, 1, device)
    with_saved = check(x, ids, weights, dy, params, layout, config=None)
    table = ExpertTable.from_parameters(layout, *params)
    again = expert_ffn_backward(dy, x, ids, weights, table, *params)
    for a, b in zip(with_saved[:4], again[:4], strict=True):
        assert torch.equal(a, b)  # bitwise repeatable


def test_frozen(device):
    torch.manual_seed(6)
    layout = ExpertLayout(3, 24, 16, torch.float32, bias=True)
    params = parameters(layout, device)
    x, ids, weights, dy = problem(layout, 7, 2, device)
    table = ExpertTable.from_parameters(layout, *params)
    all_of_them = expert_ffn_backward(dy, x, ids, weights, table, *params, config=SMALL)
    grads = expert_ffn_backward(dy, x, ids, weights, table, *params, config=SMALL, frozen=True)
    assert torch.equal(grads[0], all_of_them[0]) and torch.equal(grads[1], all_of_them[1])
    assert grads[2:] == (None,) * 4


def test_no_tokens(device):
    layout = ExpertLayout(2, 16, 16, torch.float32)
    params = parameters(layout, device)
    x, ids, weights, dy = problem(layout, 0, 2, device)
    table = ExpertTable.from_parameters(layout, *params)
    dx, dw, d_gate_up, d_down, *_ = expert_ffn_backward(dy, x, ids, weights, table, *params)
    assert dx.shape == (0, 16) and dw.shape == (0, 2)
    assert not d_gate_up.any() and not d_down.any()


@pytest.mark.parametrize("interleaved", [False, True])
def test_descriptors(interleaved, device):
    """Rows without an expert here lie between and behind the others': they must not be seen."""
    torch.manual_seed(5)
    layout = ExpertLayout(5, 64, 40, torch.float16, interleaved=interleaved)
    params = parameters(layout, device)
    x, ids, weights, dy = problem(layout, 60, 2, device)
    ids[3, 1], ids[4], ids[ids == 4] = -1, 5, 0
    table = ExpertTable.from_parameters(layout, *params)
    address = table.address.clone()
    address[2] = 0
    table = replace(table, address=address, slots=replace(table.slots, address=address))
    seen = torch.where(ids == 2, -1, ids)
    _, truth = truth_of(x, seen, weights, dy, params, layout)
    y, saved = expert_ffn_train(x, ids, weights, table, DESCRIPTORS)
    *grads, _, _ = expert_ffn_backward(
        dy, x, ids, weights, table, *params, saved=saved, config=DESCRIPTORS
    )
    for grad, exact in zip(grads, truth, strict=True):
        if grad.dim() == 3:  # that of an absent expert is unused
            grad, exact = (torch.cat([g[:2], g[3:]]) for g in (grad, exact))
            assert not grad[-1].any()  # expert 4 has no token
        assert (grad.double() - exact).norm() <= 4 * 2**-11 * exact.norm()
