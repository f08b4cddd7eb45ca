"""The operators as torch sees them: schema, fake tensors, autograd, torch.compile."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from spac import ops

OPTIONS = {"activation": "silu", "alpha": 0.0, "limit": 0.0}


def inputs(device: str, bias: bool, tokens: int = 5) -> list[torch.Tensor | None]:
    E, H, inter, k = 6, 16, 8, 2
    x = torch.randn(tokens, H, device=device)
    ids = torch.rand(tokens, E, device=device).argsort(-1)[:, :k].to(torch.int32)
    weights = torch.rand(tokens, k, device=device)
    tensors = [
        x,
        weights,
        *(torch.randn(s, device=device) for s in ((E, 2 * inter, H), (E, H, inter))),
    ]
    if bias:
        tensors += [torch.randn(s, device=device) for s in ((E, 2 * inter), (E, H))]
    x, weights, gate_up, down, *biases = (t.requires_grad_() for t in tensors)
    return [x, ids, weights, gate_up, down, *(biases or [None, None])]


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias, device):
    backend = "triton" if device == "cuda" else "cpu"
    args = (*inputs(device, bias), *OPTIONS.values(), False, False, backend)
    torch.library.opcheck(torch.ops.spac.expert_ffn.default, args, atol=1e-4, rtol=1e-4)


def test_compiles_without_a_graph_break(device):
    x, *rest = inputs(device, False)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: ops.expert_ffn(x, *rest).sin(), backend="aot_eager", fullgraph=True
    )
    leaf = x.detach().clone().requires_grad_()
    y, expected = compiled(leaf), ops.expert_ffn(x, *rest).sin()
    assert torch.equal(y, expected)
    (grad,) = torch.autograd.grad(y.sum(), leaf)
    (truth,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(grad, truth)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_graph_replays_on_new_inputs():
    x, *rest = (None if t is None else t.detach() for t in inputs("cuda", False))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ops.expert_ffn(x, *rest)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.expert_ffn(x, *rest)
    for _ in range(3):
        x.normal_()
        rest[0].copy_(rest[0].roll(1, 0))
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, ops.expert_ffn(x, *rest))


class Outputs(TorchDispatchMode):
    """Counts the tensors that the backward operator returns."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.spac.expert_ffn_backward.default:
            self.count = len(out)
        return out


@pytest.mark.parametrize("bias", [False, True])
def test_frozen_experts_get_no_gradients_computed(bias, device):
    args = inputs(device, bias)
    ops.expert_ffn(*args).square().sum().backward()
    expected = args[0].grad, args[2].grad
    frozen = [args[0].detach().requires_grad_(), args[1], args[2].detach().requires_grad_()]
    frozen += [None if t is None else t.detach() for t in args[3:]]
    with Outputs() as outputs:
        ops.expert_ffn(*frozen).square().sum().backward()
    assert outputs.count == 2
    assert torch.equal(frozen[0].grad, expected[0]) and torch.equal(frozen[2].grad, expected[1])


def test_opcheck_of_the_backward(device):
    x, *rest = (t if t is None else t.detach() for t in inputs(device, True))
    backend = "triton" if device == "cuda" else "cpu"
    for frozen in (False, True):
        args = (torch.randn_like(x), x, *rest, *OPTIONS.values(), False, False, backend, frozen)
        torch.library.opcheck(torch.ops.spac.expert_ffn_backward.default, args)


def test_derivatives_that_are_not_computed_are_refused(device):
    x, ids, weights, *parameters = inputs(device, False)
    (first,) = torch.autograd.grad(
        ops.expert_ffn(x, ids, weights, *parameters).sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="second derivatives"):
        first.sum().backward()
    x, weights, *parameters = (None if t is None else t.detach() for t in (x, weights, *parameters))

    def f(x):
        return ops.expert_ffn(x, ids, weights, *parameters)

    for refused in (
        lambda: torch.func.grad(lambda x: f(x).sum())(x),
        lambda: torch.func.jvp(f, (x,), (x,)),
        lambda: torch.func.hessian(lambda x: f(x).sum())(x),
    ):
        with pytest.raises(RuntimeError, match=r"torch\.func or in forward mode"):
            refused()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward mode"):
        f(forward_ad.make_dual(x, x))
