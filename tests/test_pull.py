"""Experts on their way into GPU memory: who chooses them, who brings them, who waits for them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import spac
from spac import ops, reference
from spac.attachment import attachment
from spac.budget import bytes_for_ratio
from spac.config import SpacConfig
from spac.keep import stream_and_keep
from spac.kernels.pull import pull, wait
from spac.kernels.split_window import split_window
from spac.layout import ExpertLayout, ExpertTable, Places
from spac.pool import SlotPool
from spac.pull import Pull
from spac.store import HostStore, blob_views


def make(E=6, H=40, inter=24, places=3, dtype=torch.float32, device="cpu"):
    """Experts in host memory, and poisoned places for some of them."""
    layout = ExpertLayout(E, H, inter, dtype)
    store = HostStore([layout], pin=torch.cuda.is_available())
    views = blob_views(store.allocate(), layout)
    for view in views.values():
        view.copy_(torch.randn(view.shape))
    memory = torch.full((places, layout.blob_bytes + 256), 255, dtype=torch.uint8, device=device)
    exchanged = torch.full((1, places, 2), -1, dtype=torch.int32, device=device)
    link = Pull(memory, exchanged, [layout])
    return layout, store, views, store.table(0).address.to(device), link


def order(places, host, experts):
    """Let `experts` be the ones that come, one to a place's own memory."""
    places.source.zero_()
    places.of.fill_(-1)
    places.flags.zero_()
    for place, expert in enumerate(experts):
        places.source[place] = host[expert]
        places.target[place] = places.memory[place].data_ptr()
        places.of[expert] = place


@pytest.mark.parametrize("experts", [[], [4], [5, 0, 2]], ids=str)
@pytest.mark.parametrize("way", ["kernel", "engine"])
def test_brings_whole_experts(experts, way, device):
    layout, store, _, host, link = make(device=device)
    places = link.places[0]
    order(places, host, experts)
    if way == "kernel":
        pull(places, layout.blob_bytes)
        wait(places)
    else:
        link.start(0)
        link.finish()
        link.check()
    rows = places.memory.cpu()
    for place in range(3):
        here = rows[place, : layout.blob_bytes]
        if place < len(experts):
            assert torch.equal(here, store.blobs[0][experts[place]])
        else:
            assert (here == 255).all()
    assert (rows[:, layout.blob_bytes :] == 255).all()
    assert places.flags.tolist() == [1] * len(experts) + [0] * (3 - len(experts))
    assert not places.arrived.any() and not places.failed.any()


def test_who_does_not_come_is_an_error(device):
    _, _, _, host, link = make(device=device)
    order(link.places[0], host, [1])
    wait(link.places[0], longest=20)
    if device == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="an expert did not cross the link in time"):
        link.check()


@pytest.mark.parametrize("wanted", [0, 1, 2, 9])
@pytest.mark.parametrize("room", [1, 3, 8])
def test_split_gives_them_places(wanted, room, device):
    """Kernel and reference agree; the best come, and take the slots of the least."""
    E, ids = 40, torch.randint(-1, 41, (9, 4), device=device, dtype=torch.int32)
    slots, host = 256 * torch.randint(1, 2**50, (2, E), device=device)
    slots[torch.rand(E, device=device) < 0.7] = 0
    streams = torch.full((E + 1,), wanted, dtype=torch.int32, device=device)
    value = (torch.rand(E, device=device) * 16 - 4).round() / 4  # ties, and zeros of both signs
    value[torch.rand(E, device=device) < 0.2] = -torch.inf
    value[(torch.rand(E, device=device) < 0.1) & (slots != 0)] = torch.inf
    found = []
    for run in (split_window, reference.split_window):
        memory = torch.empty(room, 64, dtype=torch.uint8, device=device)
        exchanged = torch.zeros(1, room, 2, dtype=torch.int32, device=device)
        places = Places.over(memory, value[None], exchanged)[0]
        for t in (places.source, places.target, places.of, places.flags, exchanged):
            t.fill_(-7)
        utility = torch.zeros(E, dtype=torch.int32, device=device)
        bounds = torch.tensor([2, 1], dtype=torch.int32, device=device)
        pairs, frequency, streamed = (
            torch.zeros(n, dtype=torch.int64, device=device) for n in (4, E, 1)
        )
        address = slots.clone()
        state = utility, bounds, pairs, frequency, streams, streamed
        where, cpu_ids = run(ids, address, host, *state, 5, places)
        begin, end = memory.data_ptr(), memory.data_ptr() + memory.numel()
        own = [torch.where((t >= begin) & (t < end), t - begin, t) for t in (where, places.target)]
        found.append([*own, cpu_ids, places.of, places.source, places.flags, exchanged, address])
    for ours, truth in zip(*found, strict=True):
        assert torch.equal(ours, truth)
    coming = (places.of >= 0).nonzero().flatten()
    missing = (frequency > 0) & (slots == 0)
    assert len(coming) == int(streamed) == min(wanted, room, int(missing.sum()))
    place = places.of[coming].long()
    assert torch.equal(places.source[place], host[coming])
    assert torch.equal(where[coming], places.target[place])
    for newcomer, victim in exchanged[0].tolist():
        if newcomer >= 0:
            assert where[newcomer] == address[newcomer] == slots[victim] and address[victim] == 0
            assert frequency[victim] == 0
            assert value[newcomer] + frequency[newcomer] > value[victim]
    # As spac.keep has it.
    n, worth = frequency.double().cpu().numpy(), value.double().cpu().numpy()
    here = (slots != 0).cpu().numpy()
    read, new, old = stream_and_keep(n, worth, n + worth, here, min(wanted, room))
    assert sorted(read.tolist()) == coming.tolist()
    told = {tuple(pair) for pair in exchanged[0].tolist() if pair[0] >= 0}
    assert told == set(zip(new.tolist(), old.tolist(), strict=True))


def test_the_pool_follows(device):
    """What windows exchange among copies that come and go: every slot is somebody's."""
    layout = ExpertLayout(8, 4, 3, torch.float32)
    pool = SlotPool([layout], 3, torch.device(device))
    for expert in (0, 1, 2):
        pool.load(0, expert, pool.take(0, expert))
    pool.publish()
    memory = torch.empty(2, layout.blob_bytes, dtype=torch.uint8, device=device)
    exchanged = torch.tensor([[[5, 1], [6, 2]]], dtype=torch.int32, device=device)
    link = Pull(memory, exchanged, [layout])
    slots = pool.slot_of[0].copy()
    pool.evict(0, 2)  # at the same time
    pool.held[0, 6] = True  # a copy of the other, into another slot, is under way
    link.learn(exchanged.cpu(), pool)
    assert pool.slot_of[0].tolist() == [slots[0], -1, -1, -1, -1, slots[1], slots[2], -1]
    assert pool.held[0].tolist() == [True, False, False, False, False, True, True, False]
    pool.evict(0, 1)  # one that has left
    pool.publish()
    assert pool.take(0, 3) is None and not pool.held[0, 3]
    assert (pool.loads, pool.evictions, pool.kept) == (5, 2, 2)


def brought_while_coming():
    """A pool of two slots, of which expert 3 has two: one for its copy, which is under way, the
    other since a window streamed it there."""
    pool = SlotPool([ExpertLayout(4, 4, 3, torch.float32)], 2, torch.device("cpu"))
    pool.load(0, 0, pool.take(0, 0))
    pool.publish()
    slot = pool.take(0, 3)
    pool.exchanged(*np.array([[0, 3, 0]]).T)
    return pool, slot


def test_a_copy_that_comes_second_gives_its_slot_back():
    pool, slot = brought_while_coming()
    pool.load(0, 3, slot)
    pool.publish()
    assert pool.take(0, 1) == slot and pool.loads - pool.evictions == 1 == pool.doubled


def test_a_copy_outlives_two_exchanges_of_its_expert():
    """While it is under way, windows stream the expert into a slot and give that to another."""
    pool, slot = brought_while_coming()
    pool.exchanged(*np.array([[0, 1, 3]]).T)
    assert pool.held[0].tolist() == [False, True, False, True]
    pool.load(0, 3, slot)
    pool.quiet = True  # a draft may not bring it once more
    places = [(np.array([0]), np.array([expert])) for expert in (3, 1)]
    assert not pool.replace(*places, lambda *args: pytest.fail("copied")).any()
    pool.publish()
    assert pool.slot_of[0].tolist() == [-1, 1 - slot, -1, slot]
    assert pool.loads - pool.evictions == 2


def test_a_prompt_learns_before_it_publishes(tiny_moe):
    """The last window of a text exchanged experts, and the copy thread evicts one: the next text's
    prompt must not be shown slots as they were before that window."""
    settings = {"max_length": 256, "max_window": 8, "max_copies": 0, "stream_missing": True}
    model = tiny_moe(num_hidden_layers=1)
    spac.attach(model, bytes_for_ratio(model, 0.5, SpacConfig(**settings)), **settings)
    engine = attachment(model).engine
    pool, told = engine.pool, torch.full((1, 2), -1)
    for _ in range(50):
        if (told >= 0).any():
            break
        prompt = torch.randint(0, 96, (1, 20))
        spac.generate(model, prompt, max_new_tokens=6)
        told = engine._state.exchanged[0].cpu()
    assert (told >= 0).any()
    resident = np.flatnonzero(pool.slot_of[0] >= 0)
    pool.evict(0, int(np.setdiff1d(resident, told[:, 1].numpy())[0]))
    spac.generate(model, prompt, max_new_tokens=1)
    begin, slots = pool.memory.data_ptr(), pool.slot_of.astype(np.int64)
    shown = np.where(slots >= 0, begin + slots * pool.slot_bytes, 0)
    assert np.array_equal(pool.address.cpu().numpy(), shown)
    spac.detach(model)


@pytest.mark.parametrize("tokens", [1, 5, 20], ids=lambda n: f"T{n}")
def test_ffn_waits_for_them(tokens, device):
    """Some experts in slots, some on their way, some nowhere: the first two kinds add up."""
    layout, store, views, host, link = make(device=device)
    places = link.places[0]
    slots = store.blobs[0].to(device)
    x = torch.randn(tokens, 40, device=device)
    ids = torch.randint(0, 6, (tokens, 2), device=device, dtype=torch.int32)
    weights = torch.rand(tokens, 2, device=device)
    order(places, host, [5, 0, 2])
    where = torch.zeros(6, dtype=torch.int64, device=device)
    where[1] = slots.data_ptr() + slots.stride(0)
    for place, expert in enumerate([5, 0, 2]):
        where[expert] = places.memory.data_ptr() + place * places.memory.stride(0)
    table = replace(ExpertTable.from_blobs(layout, where, owner=slots), places=places)
    link.start(0)
    y = ops.expert_ffn_table(x, ids, weights, table, backend="triton")
    link.finish()
    link.check()
    known = torch.where(where[ids.long()] != 0, ids, -1).cpu()
    truth = reference.expert_ffn(
        x.cpu().double(), known, weights.cpu().double(), views["gate_up"].double(),
        views["down"].double(), replace(layout, dtype=torch.float32),
    )  # fmt: skip
    torch.testing.assert_close(y.cpu().double(), truth, rtol=1e-4, atol=1e-4)
