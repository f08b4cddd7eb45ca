"""The verify kernels equal the reference bit for bit, in every result and in-place update."""

from functools import partial

import numpy as np
import pytest
import torch

from spac import ops, reference, utility


@pytest.fixture(params=["triton", "cpu"])
def backend(request):
    return request.param


@pytest.fixture
def device(backend, device):
    return device if backend == "triton" else "cpu"


@pytest.fixture
def run(backend):
    return partial(ops.verify, backend=backend)


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
def test_is_the_reference(W, k, E, absent, run, device):
    torch.manual_seed(W + E)
    ids, address = window(W, k, E, absent, torch.int32 if W % 2 else torch.int64, device)
    states = []
    for split in (run, reference.verify):
        generator = torch.Generator(device).manual_seed(7)
        utility = torch.randint(0, 6, (E,), generator=generator, device=device, dtype=torch.int32)
        bounds = torch.tensor([2, 1], dtype=torch.int32, device=device)
        counters = torch.tensor([5, 2**40, 0, 1], device=device)
        outs = split(ids, address, utility, bounds, counters, 5)
        states.append([*outs, utility, counters])
    for ours, truth in zip(*states, strict=True):
        assert ours.dtype == truth.dtype
        assert torch.equal(ours, truth)


def test_utility_follows_the_reference_over_many_windows(run, device):
    torch.manual_seed(0)
    numpy = np.zeros(12, dtype=np.int32)
    ours, truth = (torch.zeros(12, dtype=torch.int32, device=device) for _ in range(2))
    bounds = torch.tensor([1, 2], dtype=torch.int32, device=device)
    counters = torch.zeros(4, dtype=torch.int64, device=device)
    for _ in range(15):
        ids, address = window(6, 2, 12, 0.3, torch.int32, device)
        ids[:, 0] = 4
        run(ids, address, ours, bounds, counters, 3)
        reference.verify(ids, address, truth, bounds, counters, 3)
        numpy = utility.update(numpy, ids.cpu(), 1, 2, 3)
        assert torch.equal(ours, truth)
        assert np.array_equal(ours.cpu(), numpy)
    assert ours.max() == 3  # the clip was reached


def test_rows_of_larger_tensors_are_updated_in_place(run, device):
    """The engine passes one layer of [L, E] tensors."""
    utility = torch.zeros(3, 4, dtype=torch.int32, device=device)
    counters = torch.zeros(3, 4, dtype=torch.int64, device=device)
    ids = torch.tensor([[0, 2], [0, 3]], dtype=torch.int32, device=device)
    address = torch.tensor([16, 0, 0, 32], device=device)
    bounds = torch.tensor([1, 1], dtype=torch.int32, device=device)
    run(ids, address, utility[1], bounds, counters[1], 5)
    assert utility.tolist() == [[0] * 4, [1, 0, 1, 1], [0] * 4]
    assert counters.tolist() == [[0] * 4, [4, 3, 3, 2], [0] * 4]


@pytest.mark.parametrize("E", [1, 7])
def test_an_empty_window(E, run, device):
    utility = torch.full((E,), 2, dtype=torch.int32, device=device)
    counters = torch.zeros(4, dtype=torch.int64, device=device)
    ids = torch.zeros(0, 3, dtype=torch.int32, device=device)
    address = torch.ones(E, dtype=torch.int64, device=device)
    bounds = torch.tensor([1, 1], dtype=torch.int32, device=device)
    *_, order, offsets = run(ids, address, utility, bounds, counters, 5)
    assert utility.tolist() == [1] * E and counters.tolist() == [0] * 4
    assert order.numel() == 0 and offsets.tolist() == [0] * (E + 1)


def test_arguments_are_checked(run, device):
    ids = torch.zeros(2, 2, dtype=torch.int32, device=device)
    address = torch.zeros(4, dtype=torch.int64, device=device)
    utility = torch.zeros(4, 2, dtype=torch.int32, device=device)
    bounds = torch.ones(2, dtype=torch.int32, device=device)
    counters = torch.zeros(4, dtype=torch.int64, device=device)
    errors = (ValueError, RuntimeError)
    with pytest.raises(errors, match=r"utility: expected .*contiguous .*\[4\]"):
        run(ids, address, utility[:, 0], bounds, counters)
    with pytest.raises(errors, match=r"counters: expected .*contiguous .*\[4\]"):
        run(ids, address, utility[:, 0].contiguous(), bounds, counters.int())
