"""The operators as torch sees them: schema, fake tensors, autograd, torch.compile."""

import pytest
import torch

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
