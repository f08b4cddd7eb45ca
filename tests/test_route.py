"""Routing and verify in one launch equal the reference's two steps."""

import pytest
import torch

from spac import ops, reference


def state(E, device, absent=0.4):
    address = torch.arange(16, 16 + E, device=device)
    address[torch.rand(E, device=device) < absent] = 0
    utility = torch.randint(0, 6, (E,), device=device, dtype=torch.int32)
    bounds = torch.tensor([2, 1], dtype=torch.int32, device=device)
    return address, utility, bounds, torch.zeros(4, dtype=torch.int64, device=device)


@pytest.mark.parametrize("W, k, E", [(1, 8, 128), (5, 6, 64), (3, 1, 1), (16, 2, 9), (40, 4, 33)])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_route_and_verify(W, k, E, normalize, dtype, device):
    torch.manual_seed(W + E)
    logits = torch.randn(W, E, device=device).to(dtype)
    address, utility, bounds, counters = state(E, device)
    progress = torch.zeros(4, dtype=torch.int32, device=device)
    own = (utility.clone(), bounds, counters.clone(), progress)
    weights, ids, outputs = ops.route_verify(logits, k, normalize, address, *own, backend="triton")
    truth_weights, truth_ids = reference.route(logits, k, normalize)
    truth = reference.verify(truth_ids, address, utility, bounds, counters, 5)
    assert torch.equal(ids, truth_ids)
    torch.testing.assert_close(weights, truth_weights, rtol=1e-5, atol=1e-7)
    for ours, expected in zip(outputs, truth, strict=True):
        assert torch.equal(ours, expected)
    assert torch.equal(own[0], utility) and torch.equal(own[2], counters)
    assert not progress.any()


def test_is_the_router_of_transformers(tiny_moe, device):
    model = tiny_moe().to(device)
    router = model.model.layers[0].mlp.gate
    x = torch.randn(7, model.config.hidden_size, device=device)
    logits, scores, chosen = router(x)
    state_of = state(model.config.num_experts, device)
    progress = torch.zeros(4, dtype=torch.int32, device=device)
    raw = x @ router.weight.T  # what the router returns may be logits or probabilities
    weights, ids, _ = ops.route_verify(raw, 4, True, *state_of, progress, backend="triton")
    assert torch.equal(ids.long(), chosen.reshape(7, -1)[:, :4])
    torch.testing.assert_close(weights, scores.reshape(7, -1)[:, :4])


def test_what_does_not_fit_is_refused(device):
    state_of = state(64, device)
    progress = torch.zeros(4, dtype=torch.int32, device=device)
    logits = torch.randn(3, 60, device=device)
    with pytest.raises(ValueError, match=r"expected logits \[W, 64\] .* got \[3, 60\]"):
        ops.route_verify(logits, 4, True, *state_of, progress, backend="triton")
