"""The sorted pairs and their tiles."""

from types import SimpleNamespace

import pytest
import torch

from spac.kernels import plan as plan_module
from spac.kernels.plan import DIRECT, make_plan


@pytest.mark.parametrize(
    "tokens, top_k, E, block_m",
    [
        (1, 1, 1, 16),
        (300, 4, 9, 32),
        (170, 7, 33, 48),
        (700, 2, 5, 64),
        (DIRECT // 8 + 37, 8, 6, 64),
    ],
)
def test_pairs_are_sorted_and_cut(tokens, top_k, E, block_m, device, monkeypatch):
    torch.manual_seed(tokens)
    monkeypatch.setattr(plan_module, "CHUNKS", 8)  # several parts a chunk
    ids = torch.randint(-1, E + 2, (tokens, top_k), device=device, dtype=torch.int32)
    address = torch.arange(1, E + 1, device=device) * 64
    address[E // 2] = 0
    slots = SimpleNamespace(span=(64, 64))
    table = SimpleNamespace(layout=SimpleNamespace(num_experts=E), address=address, slots=slots)
    plan = make_plan(ids, table, block_m)
    flat = ids.flatten()
    expected, offsets, tiles = [], [0], []
    for e in range(E):
        pairs = torch.nonzero(flat == e).flatten().tolist()
        for row in range(0, len(pairs), block_m):
            rows = min(block_m, len(pairs) - row)
            here = bool(address[e])
            tiles.append((e if here else -1, offsets[-1] + row, rows if here else -rows))
        expected += pairs
        offsets.append(len(expected))
    assert plan.offsets.tolist() == offsets
    assert plan.order[: len(expected)].tolist() == expected
    assert len(tiles) < plan.tiles
    columns = (plan.tile_expert, plan.tile_row, plan.tile_rows)
    found = list(zip(*(c.tolist() for c in columns), strict=True))
    assert found[: len(tiles)] == tiles
    rest = min(block_m, flat.numel() - len(expected))
    assert found[len(tiles)] == (-1, len(expected), -rest)
    assert all(e == -1 and rows == 0 for e, _, rows in found[len(tiles) + 1 :])
    for (e, *_), slot in zip(tiles, plan.tile_slot.tolist(), strict=False):
        assert e in (-1, slot)
