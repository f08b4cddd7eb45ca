"""The device's part of the hand-over: rows and flags in host memory."""

import pytest
import torch

from spac.kernels.handoff import send, wait


def host(*shape, dtype):
    return torch.full(shape, -7, dtype=dtype, pin_memory=torch.cuda.is_available())


def sync():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens, hidden, top_k", [(1, 5, 2), (9, 300, 8), (3, 2, 4)])
def test_send(tokens, hidden, top_k, dtype, device):
    x = torch.randn(hidden, tokens, device=device).to(dtype).T  # strided
    ids = torch.randint(-1, 9, (tokens, top_k), dtype=torch.int32, device=device)
    weights = torch.rand(tokens, top_k, device=device)
    rows = (
        host(tokens + 2, hidden, dtype=dtype),
        host(tokens + 2, top_k, dtype=torch.int32),
        host(tokens + 2, top_k, dtype=torch.float32),
    )
    bell = host(4, dtype=torch.int32)
    window = torch.tensor([11], dtype=torch.int32, device=device)
    send(x, ids, weights, tuple(r[:tokens] for r in rows), bell, window, 2)
    sync()
    for sent, row in zip((x, ids, weights), rows, strict=True):
        assert torch.equal(sent.cpu(), row[:tokens]) and (row[tokens:] == -7).all()
    assert bell.tolist() == [-7, -7, 11, -7]


def test_wait_returns_when_done_and_gives_up_when_not(device):
    done, failed = host(3, dtype=torch.int32), host(1, dtype=torch.int32).zero_()
    window = torch.tensor([5], dtype=torch.int32, device=device)
    polls = torch.full((3,), -7, dtype=torch.int32, device=device)
    done[1] = 5
    wait(done, failed, window, polls, 1)
    sync()
    assert failed.item() == 0
    wait(done, failed, window, polls, 2, max_polls=50)
    sync()
    assert failed.item() == 1
    wait(done, failed, window, polls, 0)  # at once: nobody answers any more
    sync()
    assert failed.item() == 1
    assert polls.tolist() == [0, 0, 50]
