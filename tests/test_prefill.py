"""The experts of a prompt: slots, two areas and the CPU together give the whole."""

import dataclasses

import numpy as np
import pytest
import torch

import spac
from spac import ops
from spac.attachment import attachment
from spac.budget import bytes_for_ratio
from spac.config import SpacConfig
from spac.control import Snapshot
from spac.cost import CostModel
from spac.layout import ExpertLayout, ExpertTable
from spac.prefill import Prefill, area_experts
from spac.store import HostStore

COSTS = CostModel(1000, 0, 1e-6, 1e-8, 0, 1e-4, 1e-6, 0, 1e-7)
SIDES = {
    "both": COSTS,
    "link": dataclasses.replace(COSTS, cpu_expert=1.0),
    "cpu": dataclasses.replace(COSTS, h2d_byte=1.0),
}


def layer(E, H, inter, resident, device):
    layout = ExpertLayout(E, H, inter, torch.float32)
    store = HostStore([layout], pin=device == "cuda")
    store.allocate().view(torch.float32).normal_()
    slots = store.blobs[0].to(device)
    address = slots.data_ptr() + slots.stride(0) * torch.arange(E, device=device)
    address[torch.rand(E, device=device) >= resident] = 0
    return store, ExpertTable.from_blobs(layout, address, owner=slots)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("E, resident", [(40, 0.3), (8, 0.0), (24, 1.0)])
def test_adds_up_to_all_experts(E, resident, sides, device):
    torch.manual_seed(E)
    store, slots = layer(E, 20, 7, resident, device)
    prefill = Prefill(store, torch.device(device), SIDES[sides])
    for tokens in (70, 3, 33):  # areas are used again and again
        x, weights = torch.randn(tokens, 20, device=device), torch.rand(tokens, 2, device=device)
        ids = torch.randint(-1, E + 1, (tokens, 2), dtype=torch.int32, device=device)
        y = prefill.forward(0, x, ids, weights, slots)
        truth = ops.expert_ffn_table(x.cpu(), ids.cpu(), weights.cpu(), store.table(0))
        torch.testing.assert_close(y.cpu(), truth, rtol=1e-4, atol=1e-4)
    assert bool(prefill.copied) == (sides != "cpu" and resident < 1)


def test_shares_so_that_both_sides_end_together():
    store, slots = layer(32, 8, 8, 0.0, "cpu")
    prefill = Prefill(store, torch.device("cpu"), COSTS)
    ids = torch.repeat_interleave(torch.arange(32), torch.arange(32) + 1)[:, None]
    counts = np.bincount(ids.ravel(), minlength=32)
    on_link, on_cpu = prefill._share(counts, slots.address.numpy())
    assert sorted([*on_link, *on_cpu]) == list(range(32))
    assert on_link.min() > on_cpu.max()  # the CPU has those of the fewest tokens
    seconds = [
        max(float(COSTS.cpu(n, sum(range(n + 1)))), float(COSTS.h2d(32 - n))) for n in range(33)
    ]
    assert seconds[len(on_cpu)] == min(seconds)


def test_the_prompt_tells_the_policy_what_the_text_needs(tiny_moe, device):
    settings = {"max_window": 4, "max_length": 64}
    model = tiny_moe()
    spac.attach(model, bytes_for_ratio(model, 0.3, SpacConfig(**settings)), **settings)
    engine, seen = attachment(model).engine, []
    engine.copier.submit = seen.append
    with torch.no_grad():
        for tokens in (20, 11, 3, 2):  # two chunks of a prompt, two windows
            model(torch.randint(0, 96, (1, tokens), device=model.device))
    assert seen[0].prompt.sum() == pytest.approx(3 * engine.top_k * len(engine.frequency))
    assert seen[1].prompt is None and engine.frequency.sum() == 5 * engine.top_k * len(
        engine.frequency
    )
    spac.detach(model)


def test_a_snapshot_that_comes_late_keeps_its_prompt(tiny_moe):
    model = tiny_moe()
    spac.attach(model, bytes_for_ratio(model, 0.3, SpacConfig(policy="static")), policy="static")
    engine = attachment(model).engine
    copier, zeros = engine.copier, engine.frequency.cpu().numpy()
    for window, prompt in enumerate((None, zeros + 3.0, None)):
        copier.submit(Snapshot(window, 0.0, zeros, zeros, prompt))
    latest, _ = copier._latest()
    assert latest.window == 2 and (latest.prompt == 3).all()
    spac.detach(model)


def test_after_a_prompt_every_slot_may_change_at_once(tiny_moe):
    model = tiny_moe()
    spac.attach(
        model, bytes_for_ratio(model, 0.4, SpacConfig()), max_copies=1, stream_missing=False
    )
    engine = attachment(model).engine
    copier, pool = engine.copier, engine.pool
    copier.close()
    counts = np.zeros(pool.held.shape, dtype=np.int64)
    prompt = np.where(pool.held, 0.0, np.random.default_rng(0).uniform(1, 2, counts.shape))
    missing, held = int((~pool.held).sum()), pool.held.copy()
    for window in range(1, 5):
        copier._round(
            Snapshot(window, float(window), counts, counts, prompt if window == 1 else None)
        )
        pool.publish()
        changed = int((held & (pool.slot_of < 0)).sum())
        assert changed == min(missing, pool.num_slots)  # evicted by the first round, all of them
        new = int((~held & (pool.slot_of >= 0)).sum())
        assert new == (changed if window > 1 else 0)
    spac.detach(model)


@pytest.mark.parametrize("policy", ["spac", "static"])
def test_what_the_first_prompt_chose_most_stays(tiny_moe, device, policy):
    model = tiny_moe(num_experts=24)
    settings = {"policy": policy, "stream_missing": True, "max_window": 4, "max_length": 128}
    tokens = torch.randint(0, 96, (1, 60))
    with torch.no_grad():
        expected = model(tokens).logits
        spac.attach(model, bytes_for_ratio(model, 0.3, SpacConfig(**settings)), **settings)
        engine = attachment(model).engine
        pool, prefill, first = engine.pool, engine.prefill, engine.pool.slot_of.copy()
        prefill.costs = SIDES["link"]  # everything that is missing crosses
        parts = tokens[:, :40], tokens
        got = [model(part.to(model.device)).logits.cpu() for part in parts]
    torch.testing.assert_close(got[1], expected, rtol=1e-3, atol=1e-4)
    assert (pool.held == (pool.slot_of >= 0)).all()
    assert sorted(pool.slot_of[pool.held]) == sorted(first[first >= 0])
    if policy == "static":
        assert (pool.slot_of == first).all()
    for layer in range(len(first)):
        pairs, held = prefill._pairs[layer], pool.held[layer]
        assert held.sum() == (first[layer] >= 0).sum() and pairs.sum() > 0
        if policy == "spac":
            assert pairs[held].min() >= pairs[~held].max()
        for expert in np.flatnonzero(held):
            slot = int(pool.slot_of[layer, expert])
            address = pool.memory.data_ptr() + slot * pool.slot_bytes
            assert int(pool.address[layer, expert]) == address
            blob = engine.store.blobs[layer][expert]
            assert torch.equal(pool.memory[slot, : blob.numel()].cpu(), blob)
    spac.detach(model)


def test_areas_hold_a_part_of_a_layer_or_nothing():
    assert area_experts(ExpertLayout(128, 2048, 768, torch.bfloat16)) == 10
    assert area_experts(ExpertLayout(8, 16, 16, torch.bfloat16)) == 1
    assert area_experts(ExpertLayout(8, 4096, 14336, torch.bfloat16)) == 0  # 336 MiB each
