"""Who computes a window's experts: kernel and reference agree, in every number."""

import pytest
import torch

from spac import reference
from spac.kernels.split_window import split_window


def make(W, k, E, absent, device):
    """Arguments but for the last: ids, where experts are, and the layer's state."""
    ids = torch.randint(-1, E + 1, (W, k), device=device, dtype=torch.int32)
    address, host = torch.randint(1, 2**62, (2, E), device=device)
    address[torch.rand(E, device=device) < absent] = 0
    streams = (torch.rand(E + 1, device=device) * (torch.arange(E + 1, device=device) + 2)).int()
    utility = torch.randint(0, 6, (E,), device=device, dtype=torch.int32)
    bounds = torch.randint(1, 4, (2,), device=device, dtype=torch.int32)
    counters, frequency = (torch.randint(0, 2**40, (n,), device=device) for n in (4, E))
    return [ids, address, host, utility, bounds, counters, frequency, streams]


@pytest.mark.parametrize(
    "W, k, E",
    [(1, 8, 128), (9, 8, 128), (70, 8, 60), (5, 2, 33), (2, 3, 1), (40, 4, 300), (3, 9, 600)],
)
@pytest.mark.parametrize("absent", [0.0, 0.6, 1.0])
def test_is_the_reference(W, k, E, absent, device):
    args = make(W, k, E, absent, device)
    states = []
    for run in (split_window, reference.split_window):
        own = [t.clone() for t in (*args, torch.tensor([7], device=device))]
        states.append([*run(*own, 5), *own])
    for ours, truth in zip(*states, strict=True):
        assert ours.dtype == truth.dtype and torch.equal(ours, truth)


def test_ids_that_are_no_int32(device):
    args = make(9, 4, 50, 0.7, device)
    args[0][0, :2] = torch.tensor([-1, 50])
    truth = reference.split_window(
        *map(torch.clone, args), torch.zeros(1, dtype=torch.int64, device=device), 5
    )
    wide = args[0].long()
    args[0] = torch.where(wide < 0, 2**32 + 7, torch.where(wide == 50, 8 - 2**32, wide))
    ours = split_window(*args, torch.zeros(1, dtype=torch.int64, device=device), 5)
    assert all(map(torch.equal, ours, truth))


def test_sides_are_disjoint_and_complete(device):
    args = make(9, 4, 50, 0.7, device)
    ids, address, host, streams = args[0], args[1], args[2], args[-1]
    valid = (ids >= 0) & (ids < 50)
    counts = torch.bincount(ids[valid].long(), minlength=50)
    missing = int(((counts > 0) & (address == 0)).sum())
    for wanted in (0, 1, missing, missing + 5):
        streams.fill_(wanted)
        streamed = torch.zeros(1, dtype=torch.int64, device=device)
        where, cpu_ids = split_window(*args, streamed, 5)
        assert int(streamed) == min(wanted, missing)
        read = (where != address).nonzero().flatten()
        assert len(read) == int(streamed) and torch.equal(where[read], host[read])
        assert (counts[read] > 0).all()
        here = where[ids.clamp(0, 49).long()] != 0
        assert torch.equal(cpu_ids, torch.where(valid & ~here, ids, -1))
        if 0 < wanted < missing:  # nobody with more pairs was left to the CPU
            left = (counts > 0) & (where == 0)
            assert counts[read].min() >= counts[left].max()


def test_arguments_are_checked(device):
    args = make(2, 2, 4, 0.5, device)
    streamed = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"streams: expected contiguous torch.int32 \[5\], got"):
        split_window(*args[:-1], args[-1][1:], streamed, 5)
    args[6] = args[6].int()
    with pytest.raises(ValueError, match="frequency: expected contiguous torch.int64"):
        split_window(*args, streamed, 5)
