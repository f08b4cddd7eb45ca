"""The device's part of the hand-over: rows and flags in host memory."""

import re

import pytest
import torch

from spac.kernels.handoff import join, send


def host(*shape, dtype):
    return torch.full(shape, -7, dtype=dtype, pin_memory=torch.cuda.is_available())


def sync():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens, hidden, top_k", [(1, 5, 2), (9, 1300, 8), (3, 2, 4)])
@pytest.mark.parametrize("some", [True, False])
def test_send(tokens, hidden, top_k, some, dtype, device):
    x = torch.randn(hidden, tokens, device=device).to(dtype).T  # strided
    ids = torch.full((tokens, top_k), -1, dtype=torch.int32, device=device)
    if some:
        ids.random_(-1, 9)
        ids[-1, -1] = 0
    weights = torch.rand(tokens, top_k, device=device)
    rows = (
        host(tokens + 2, hidden, dtype=dtype),
        host(tokens + 2, top_k, dtype=torch.int32),
        host(tokens + 2, top_k, dtype=torch.float32),
    )
    bell = host(4, dtype=torch.int32)
    window = torch.tensor([11], dtype=torch.int32, device=device)
    arrived = torch.zeros(1, dtype=torch.int32, device=device)
    to = tuple(r[:tokens] for r in rows)
    for _ in range(2):
        bell.fill_(-7)
        send(x, ids, weights, to, bell, window, arrived, 2)
        sync()
    for sent, row in zip((x, ids, weights), rows, strict=True):
        assert torch.equal(row[:tokens], sent.cpu() if some else torch.full_like(row[:tokens], -7))
        assert (row[tokens:] == -7).all()
    assert bell.tolist() == [-7, -7, 22 + some, -7] and arrived.item() == 0


def test_the_bell_rings_behind_all_that_was_sent(hopper_ptx):
    """In the order of the machine code; the interpreter knows only one order."""
    [(_, _, code)] = hopper_ptx("""
from spac.kernels.handoff import send
x, ids, weights = torch.zeros(9, 2048).half(), torch.zeros(9, 8).int(), torch.zeros(9, 8)
bell, window, arrived = (torch.zeros(n, dtype=torch.int32) for n in (4, 1, 1))
send(x, ids, weights, (x, ids, weights), bell, window, arrived, 2)
""")
    steps = r"st\.global|bar\.sync|fence\.acq_rel\.sys|atom\.global\.gpu\.acq_rel|st\.release\.sys"
    found = [m.group() for m in re.finditer(steps, code)]
    rows = [i for i, step in enumerate(found) if step == "st.global"][:-1]  # the last is `arrived`
    fence, count, ring = (
        found.index(s) for s in ("fence.acq_rel.sys", "atom.global.gpu.acq_rel", "st.release.sys")
    )
    assert len(rows) >= 4 and max(rows) < fence < count < ring
    assert "bar.sync" in found[max(rows) : fence] and "bar.sync" in found[count:ring]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_join_adds_when_done_and_gives_up_when_not(device, dtype):
    done, failed = host(3, dtype=torch.int32), host(1, dtype=torch.int32).zero_()
    flags = done, failed, torch.tensor([5], dtype=torch.int32, device=device)
    seen = torch.zeros(3, dtype=torch.int32, device=device)
    waited = torch.full((3,), -7, dtype=torch.int32, device=device)
    partial, rest = torch.randn(9, 300, device=device), host(9, 300, dtype=torch.float32)
    rest.copy_(torch.randn(9, 300))
    wanted = (partial.cpu() + rest).to(dtype)
    done[1] = 5
    ids = torch.full((9, 8), -1, dtype=torch.int32, device=device)
    alone = join(partial, rest, ids, dtype, *flags, seen, waited, 2).cpu()  # nobody is asked
    close = {"rtol": 0.01 * (dtype != torch.float32), "atol": 0}
    torch.testing.assert_close(alone, partial.cpu().to(dtype), **close)
    assert failed.item() == waited[2].item() == 0 and seen.tolist() == [0, 0, 0]
    ids[4, 7] = 0
    y = join(partial, rest, ids, dtype, *flags, seen, waited, 1).cpu()
    torch.testing.assert_close(y, wanted, **close)
    assert failed.item() == 0
    join(partial, rest, ids, dtype, *flags, seen, waited, 2, longest=50)
    sync()
    assert failed.item() == 1
    join(partial, rest, ids, dtype, *flags, seen, waited, 0)  # at once: nobody answers any more
    sync()
    assert failed.item() == 1
    assert waited.tolist()[:2] == [0, 0] and waited[2] >= 1
    assert seen.tolist() == [5, 5, 5]
