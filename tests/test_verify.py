"""The verify kernel equals the reference bit for bit, in every result and in-place update."""

import pytest
import torch

from spac import reference
from spac.kernels.verify import verify


def window(W, k, E, absent, dtype, device):
    ids = torch.randint(-1, E + 1, (W, k), device=device, dtype=dtype)
    address = torch.randint(1, 2**62, (E,), device=device)
    address[torch.rand(E, device=device) < absent] = 0
    return ids, address


@pytest.mark.parametrize(
    "W, k, E",
    [(1, 8, 128), (9, 8, 128), (16, 6, 64), (3, 1, 1), (5, 2, 33), (1, 1, 700), (150, 4, 16)],
)
@pytest.mark.parametrize("absent", [0.0, 0.5, 1.0])
def test_is_the_reference(W, k, E, absent, device):
    torch.manual_seed(W + E)
    ids, address = window(W, k, E, absent, torch.int32 if W % 2 else torch.int64, device)
    states = []
    for run in (verify, reference.verify):
        generator = torch.Generator(device).manual_seed(7)
        utility = torch.randint(0, 6, (E,), generator=generator, device=device, dtype=torch.int32)
        bounds = torch.tensor([2, 1], dtype=torch.int32, device=device)
        counters = torch.tensor([5, 2**40, 0, 1], device=device)
        outs = run(ids, address, utility, bounds, counters, 5)
        states.append([*outs, utility, counters])
    for ours, truth in zip(*states, strict=True):
        assert ours.dtype == truth.dtype
        assert torch.equal(ours, truth)


def test_utility_follows_the_reference_over_many_windows(device):
    torch.manual_seed(0)
    ours, truth = (torch.zeros(12, dtype=torch.int32, device=device) for _ in range(2))
    bounds = torch.tensor([1, 2], dtype=torch.int32, device=device)
    counters = torch.zeros(4, dtype=torch.int64, device=device)
    for _ in range(15):
        ids, address = window(6, 2, 12, 0.3, torch.int32, device)
        ids[:, 0] = 4
        verify(ids, address, ours, bounds, counters, 3)
        reference.verify(ids, address, truth, bounds, counters, 3)
        assert torch.equal(ours, truth)
    assert ours.max() == 3  # the clip was reached


def test_rows_of_larger_tensors_are_updated_in_place(device):
    """The engine passes one layer of [L, E] tensors."""
    utility = torch.zeros(3, 4, dtype=torch.int32, device=device)
    counters = torch.zeros(3, 4, dtype=torch.int64, device=device)
    ids = torch.tensor([[0, 2], [0, 3]], dtype=torch.int32, device=device)
    address = torch.tensor([16, 0, 0, 32], device=device)
    bounds = torch.tensor([1, 1], dtype=torch.int32, device=device)
    verify(ids, address, utility[1], bounds, counters[1], 5)
    assert utility.tolist() == [[0] * 4, [1, 0, 1, 1], [0] * 4]
    assert counters.tolist() == [[0] * 4, [4, 3, 3, 2], [0] * 4]


def test_arguments_are_checked(device):
    ids = torch.zeros(2, 2, dtype=torch.int32, device=device)
    address = torch.zeros(4, dtype=torch.int64, device=device)
    utility = torch.zeros(4, 2, dtype=torch.int32, device=device)
    bounds = torch.ones(2, dtype=torch.int32, device=device)
    counters = torch.zeros(4, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"utility: expected contiguous torch.int32 \[4\], got"):
        verify(ids, address, utility[:, 0], bounds, counters, 5)
    with pytest.raises(ValueError, match=r"counters: expected contiguous torch.int64 \[4\], got"):
        verify(ids, address, utility[:, 0].contiguous(), bounds, counters.int(), 5)
