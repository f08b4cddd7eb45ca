"""The operators as torch sees them: schema, fake tensors, autograd, torch.compile."""

from contextlib import contextmanager

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from spac import ops
from spac.kernels import expert_ffn, expert_ffn_backward

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


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_strides_of_the_gradients_are_those_that_compilers_expect(backend, device):
    x, ids, weights, *rest = (t if t is None else t.detach() for t in inputs(device, True))
    x, weights = (t.mT.contiguous().mT for t in (x, weights))
    args = (torch.randn_like(x), x, ids, weights, *rest, *OPTIONS.values(), False, False, backend)
    operator = torch.ops.spac.expert_ffn_backward.default
    torch.library.opcheck(operator, (*args, False), test_utils="test_faketensor")


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
    with forward_ad.dual_level():
        for position in (0, 5):  # x, a bias
            args = [t if t is None else t.detach() for t in inputs(device, True)]
            args[position] = forward_ad.make_dual(args[position], args[position])
            with pytest.raises(RuntimeError, match="forward mode"):
                ops.expert_ffn(*args)


ERRORS = {
    "bias": ({"gate_up_bias": (6, 8)}, r"gate_up_bias: expected \[6, 16\], got \[6, 8\]"),
    "down bias": ({"down_bias": (6, 1)}, r"down_bias: expected \[6, 16\], got \[6, 1\]"),
    "odd": ({"gate_up": (6, 17, 16)}, r"gate_up: expected as many gate as up rows, got 17 in"),
}


@pytest.mark.parametrize("backend", ["triton", "cpu", "torch"])
@pytest.mark.parametrize("name", ERRORS)
def test_parameters_that_do_not_fit(name, backend, device):
    shapes, message = ERRORS[name]
    names = ("x", "ids", "weights", "gate_up", "down", "gate_up_bias", "down_bias")
    args = dict(zip(names, inputs(device, True), strict=True))
    args |= {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        ops.expert_ffn(**args, backend=backend)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32], ids=str)
def test_ids_of_other_types_are_refused(dtype, device):
    x, ids, *rest = inputs(device, False)
    for backend in ("triton", "cpu", "torch"):
        with pytest.raises(ValueError, match=f"ids: expected int32 or int64, got {dtype}"):
            ops.expert_ffn(x, ids.to(dtype), *rest, backend=backend)


def test_tensors_of_several_devices_are_refused(device):
    args = inputs(device, True)
    for i in range(len(args)):
        mixed = [t.to("meta") if i == j else t for j, t in enumerate(args)]
        with pytest.raises(ValueError, match="tensors: expected one device, got .*'meta'"):
            ops.expert_ffn(*mixed, backend="triton")


def test_kernels_run_where_their_tensors_are(device, monkeypatch):
    """Triton launches on the current device."""
    inside, launched = [], []

    @contextmanager
    def device_of(tensor):
        inside.append(tensor.device)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module, name in ((expert_ffn, "expert_ffn"), (expert_ffn_backward, "expert_ffn_backward")):
        original = getattr(module, name)

        def recorded(*args, original=original, **kwargs):
            launched.append(inside[-1:])
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, recorded)
    x, *rest = inputs(device, False)
    ops.expert_ffn(x, *rest, backend="triton").sum().backward()
    assert launched == [[x.device]] * 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    args = inputs("cuda:0", True)
    there = [t.detach().to("cuda:1").requires_grad_(t.requires_grad) for t in args]
    for tensors in (args, there):
        ops.expert_ffn(*tensors).square().sum().backward()
    assert all(
        torch.equal(a.grad.cpu(), b.grad.cpu())
        for a, b in zip(args, there, strict=True)
        if a.is_leaf and a.requires_grad
    )


VIEWS = {
    "strided biases": lambda *p: (*p[:2], *(torch.stack([b, b + 1], -1)[..., 0] for b in p[2:])),
    "biases of one row": lambda *p: (*p[:2], *(b[:1].expand_as(b) for b in p[2:])),
    "one expert for all": lambda *p: (*(w[:1].expand_as(w) for w in p[:2]), *p[2:]),
}


@pytest.mark.parametrize("backend", ["triton", "cpu"])
@pytest.mark.parametrize("tokens", [5, 18])  # both paths
@pytest.mark.parametrize("name", VIEWS)
def test_views_as_parameters(name, tokens, backend, device):
    if device == "cuda" and backend == "cpu":
        pytest.skip("tensors of the GPU")
    results = []
    x, ids, weights, *parameters = inputs(device, True, tokens)
    for views, of in (
        (VIEWS[name], backend),
        (lambda *p: map(torch.clone, VIEWS[name](*p)), "torch"),
    ):
        y = ops.expert_ffn(x, ids, weights, *views(*parameters), backend=of)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, weights, *parameters])])
    for ours, truth in zip(*results, strict=True):
        assert (ours - truth).norm() <= 1e-5 * truth.norm()


@pytest.mark.parametrize("backend", ["triton", "cpu"])
@pytest.mark.parametrize("tokens", [0, 5, 18])
def test_no_pairs(tokens, backend, device):
    if device == "cuda" and backend == "cpu":
        pytest.skip("tensors of the GPU")
    x, ids, weights, *parameters = inputs(device, True, tokens)
    y = ops.expert_ffn(x, ids[:, :0], weights[:, :0], *parameters, backend=backend)
    assert y.shape == x.shape and not y.any()
    for grad in torch.autograd.grad(y.sum(), [x, *parameters]):
        assert not grad.any()
