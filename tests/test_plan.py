"""The sorted pairs and their tiles."""

from types import SimpleNamespace

import pytest
import torch

from spac.kernels.plan import make_plan


@pytest.mark.parametrize(
    "tokens, top_k, E, block_m", [(1, 1, 1, 16), (300, 4, 9, 32), (170, 7, 33, 16), (700, 2, 5, 64)]
)
def test_pairs_are_sorted_and_cut(tokens, top_k, E, block_m, device):
    torch.manual_seed(tokens)
    ids = torch.randint(-1, E + 2, (tokens, top_k), device=device, dtype=torch.int32)
    address = torch.arange(1, E + 1, device=device)
    address[E // 2] = 0
    table = SimpleNamespace(layout=SimpleNamespace(num_experts=E), address=address)
    plan = make_plan(ids, table, block_m)
    flat = ids.flatten()
    expected, offsets, tiles = [], [0], []
    for e in range(E):
        pairs = torch.nonzero(flat == e).flatten().tolist()
        tiles += [
            (e if address[e] else -1, offsets[-1] + row) for row in range(0, len(pairs), block_m)
        ]
        expected += pairs
        offsets.append(len(expected))
    assert plan.offsets.tolist() == offsets
    assert plan.order[: len(expected)].tolist() == expected
    found = list(zip(plan.tile_expert.tolist(), plan.tile_row.tolist(), strict=True))
    assert found[: len(tiles)] == tiles
    assert all(e == -1 for e, _ in found[len(tiles) :])
