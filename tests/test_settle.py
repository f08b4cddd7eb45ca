"""The settle kernel equals the reference bit for bit."""

import pytest
import torch

from spac import reference
from spac.kernels.settle import settle
from spac.kernels.verify import verify


@pytest.mark.parametrize("accepted", [0, 3, 8])
@pytest.mark.parametrize("weight", [0.0, 0.1, 0.5, 0.7, 1.0])
def test_is_the_reference(accepted, weight, device):
    torch.manual_seed(accepted)
    L, W, k, E = 2, 9, 6, 70
    ids = torch.randint(-1, E + 1, (L, W, k), device=device, dtype=torch.int32)
    ids[:, :, 0] = 3  # many pairs of one expert, so that fractions matter
    before = torch.randint(0, 6, (L, E), device=device, dtype=torch.int32)
    bounds = torch.tensor([[2, 1], [1, 2]], dtype=torch.int32, device=device)
    ours, truth = torch.full_like(before, 99), torch.full_like(before, 99)
    for run, utility in ((settle, ours), (reference.settle, truth)):
        run(utility, before, ids, torch.tensor(accepted, device=device), bounds, weight, 5)
    assert torch.equal(ours, truth)


def test_weight_one_is_verify(device):
    torch.manual_seed(1)
    ids = torch.randint(0, 20, (1, 7, 4), device=device, dtype=torch.int32)
    before = torch.randint(0, 6, (1, 20), device=device, dtype=torch.int32)
    bounds = torch.tensor([[2, 1]], dtype=torch.int32, device=device)
    after, ours = before.clone(), before.clone()
    address = torch.zeros(20, dtype=torch.int64, device=device)
    counters = torch.zeros(4, dtype=torch.int64, device=device)
    verify(ids[0], address, after[0], bounds[0], counters, 5)
    settle(ours, before, ids, torch.tensor(2, device=device), bounds, 1.0, 5)
    assert torch.equal(ours, after)


def test_arguments_are_checked(device):
    ids = torch.zeros(2, 3, 4, dtype=torch.int32, device=device)
    utility = torch.zeros(2, 5, dtype=torch.int32, device=device)
    bounds = torch.ones(1, 2, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"bounds: expected contiguous \[2, 2\], got \[1, 2\]"):
        settle(utility, utility, ids, torch.tensor(1, device=device), bounds, 0.5, 5)
