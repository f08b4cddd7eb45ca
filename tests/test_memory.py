"""What runs again and again keeps no memory: operators, windows, attachments."""

import gc

import pytest
import torch

import spac
from spac import ops
from spac.bench.soak import allocated_bytes
from spac.budget import bytes_for_ratio
from spac.config import SpacConfig
from spac.handoff import HandOff
from spac.layout import ExpertLayout, ExpertTable

pytestmark = pytest.mark.skipif(not allocated_bytes(), reason="only glibc tells what is in use")
E, H, INNER, K, T = 4, 16, 8, 2, 3
CPU = torch.device("cpu")


def kept(run, times: int, limit: int) -> int:
    """Bytes that `times` runs leave in use, after some that fill caches. What is not below `limit`
    is seen three times: caches of other threads fill when they like, and once."""
    for _ in range(8):
        run()
    for _ in range(3):
        gc.collect()
        before = allocated_bytes()
        for _ in range(times):
            run()
        gc.collect()
        if (grown := allocated_bytes() - before) < limit:
            break
    return grown


@pytest.fixture
def table():
    gate_up, down = torch.randn(E, 2 * INNER, H), torch.randn(E, H, INNER)
    return ExpertTable.from_parameters(ExpertLayout(E, H, INNER, torch.float32), gate_up, down)


def pairs():
    return torch.randn(T, H), torch.randint(0, E, (T, K), dtype=torch.int32), torch.rand(T, K)


def test_the_ffn_keeps_nothing(table):
    arguments = pairs()
    assert kept(lambda: ops.expert_ffn_table(*arguments, table, backend="cpu"), 500, 4096) < 4096


def test_verify_keeps_nothing():
    ids = torch.randint(0, E, (T, K), dtype=torch.int32)
    buffers = [torch.zeros(n, dtype=dtype) for n, dtype in ((E, torch.int64), (E, torch.int32))]
    state = *buffers, torch.ones(2, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
    assert kept(lambda: ops.verify(ids, *state, backend="cpu"), 500, 4096) < 4096


def test_the_worker_keeps_nothing(table):
    hidden, ids, weights = pairs()

    def once():
        handoff = HandOff([table] * 2, T, K, torch.float32, torch.zeros(2, dtype=torch.int32))
        for _ in range(4):
            handoff.begin(T)
            for layer in range(2):
                handoff.send(layer, hidden, ids, weights)
                handoff.join(layer, torch.zeros(T, H), ids, torch.float32)
            handoff.check()
        handoff.close()

    assert kept(once, 50, 8192) < 8192


@pytest.mark.parametrize("static", [False, True])
def test_attachments_keep_nothing(tiny_moe, static):
    pytest.importorskip("cvxpy")  # imported here, not meanwhile
    model, ids = tiny_moe(), torch.arange(9)[None]
    settings = {"max_length": 64, "static_windows": static}
    budget = bytes_for_ratio(model, 0.3, SpacConfig(**settings))

    def once():
        spac.attach(model, budget, **settings)
        spac.generate(model, ids, draft="ngram", num_draft_tokens=2, max_new_tokens=12)
        spac.detach(model)

    # CUDA keeps some of its own for streams and graphs.
    limit = 20 * (16384 if torch.cuda.is_available() else 1024)
    assert kept(once, 20, limit) < limit
