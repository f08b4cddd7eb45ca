"""The slot protocol as a state machine: a slot that is read is never a slot in flight."""

import contextlib
import threading

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from spac.layout import ExpertLayout
from spac.pool import SlotPool
from spac.testing import interrupted

LAYERS, EXPERTS, SLOTS = 2, 6, 5
NEVER = 10**9
LAYOUT = ExpertLayout(EXPERTS, 4, 3, torch.float32)
PLACE = st.tuples(st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1))


def indices(places):
    """(layers, experts) of a list of (layer, expert)."""
    return tuple(np.array(places, dtype=np.intp).reshape(-1, 2).T)


class SlotProtocol(RuleBasedStateMachine):
    """Forward and copy thread take turns in any order; slots hold the name of their expert."""

    def __init__(self):
        super().__init__()
        self.pool = SlotPool([LAYOUT] * LAYERS, SLOTS, torch.device("cpu"))
        self.filling: dict[int, tuple[int, int]] = {}
        self.unknown: list[tuple[int, int, int]] = []  # exchanges
        self.interrupted = False
        self.unpublished: set[int] = set()  # layers of which no kernel may run: replaced since
        self.stale: set[int] = set()  # where Ctrl-C came: before a window everything is published

    def slot_tag(self, slot: int) -> torch.Tensor:
        return self.pool.memory[slot, :8].view(torch.int64)

    @rule(layer=st.none() | st.integers(0, LAYERS - 1))
    def forward_passes(self, layer):
        self.learn()
        self.publish(layer)

    def publish(self, layer):
        self.pool.publish(layer)
        assert not self.pool.quiet
        layers = set(range(LAYERS) if layer is None else [layer])
        self.unpublished -= layers
        self.stale -= layers

    def learn(self):
        while self.unknown:
            self.pool.exchanged(*np.array([self.unknown.pop(0)]).T)

    @rule(
        layer=st.integers(0, LAYERS - 1),
        newcomer=st.integers(0, EXPERTS - 1),
        victim=st.integers(0, EXPERTS - 1),
    )
    def window_exchanges(self, layer, newcomer, victim):
        """The device puts a missing expert into a resident's slot; the host hears of it later."""
        address = self.pool.address[layer]
        if self.pool.quiet or layer in self.unpublished | self.stale:
            return
        if address[newcomer] == 0 and address[victim] != 0:
            slot = (int(address[victim]) - self.pool.memory.data_ptr()) // self.pool.slot_bytes
            self.slot_tag(slot)[0] = layer * EXPERTS + newcomer
            address[newcomer], address[victim] = address[victim].clone(), 0
            self.unknown.append((layer, newcomer, victim))

    @precondition(lambda self: self.filling)
    @rule(data=st.data(), out=st.booleans())
    def windows_exchange_one_that_is_coming(self, data, out):
        """Its copy is under way: a window brings it all the same, and the next takes it away."""
        layer, expert = data.draw(st.sampled_from(sorted(self.filling.values())))
        here = self.pool.address[layer].numpy() != 0
        residents, others = np.flatnonzero(here), set(np.flatnonzero(~here)) - {expert}
        if len(residents) and not here[expert]:
            self.window_exchanges(layer, expert, data.draw(st.sampled_from(list(residents))))
            if out and others:
                self.window_exchanges(layer, min(others), expert)

    @rule()
    def a_draft_begins(self):
        self.learn()
        self.pool.quiet = True

    @precondition(lambda self: self.pool.quiet)
    @rule(
        newcomers=st.lists(PLACE, unique=True, max_size=3),
        victims=st.lists(PLACE, unique=True, min_size=3, max_size=3),
    )
    def draft_replaces(self, newcomers, victims):
        pool, slots = self.pool, self.pool.slot_of
        pairs = list(zip(newcomers, victims, strict=False))
        leaving = {(i, e) for i, mail in enumerate(pool._mail) for e in mail.leaving}
        right = [
            slots[old] >= 0
            and old not in leaving
            and not pool.coming[old]
            and slots[new] < 0
            and not pool.held[new]
            for new, old in pairs
        ]
        before = [int(slots[old]) for _, old in pairs], pool.loads, pool.evictions

        def copy(layers, experts, into):
            assert into.tolist() == [s for s, ok in zip(before[0], right, strict=True) if ok]
            for layer, expert, slot in zip(layers, experts, into, strict=True):
                self.slot_tag(slot)[0] = layer * EXPERTS + expert

        places = (indices([p[i] for p in pairs]) for i in range(2))
        assert pool.replace(*places, copy).tolist() == right
        assert (pool.loads - sum(right), pool.evictions - sum(right)) == before[1:]
        for (new, old), slot, ok in zip(pairs, before[0], right, strict=True):
            if ok:
                assert slots[new] == slot and slots[old] == -1
                assert pool.held[new] and not pool.held[old]
                self.unpublished |= {new[0], old[0]}

    @rule(layer=st.integers(0, LAYERS - 1), data=st.data())
    def prefill_exchanges(self, layer, data, place=NEVER):
        """The area holds the experts that it brings."""
        self.learn()
        self.publish(layer)
        pool = self.pool
        settled = (pool.slot_of[layer] >= 0) & pool.held[layer] & ~pool.coming[layer]
        old = np.flatnonzero(settled).tolist()
        new = [e for e in range(EXPERTS) if not pool.held[layer, e] and pool.slot_of[layer, e] < 0]
        count = data.draw(st.integers(0, min(len(old), len(new))))
        blobs = [torch.zeros(pool.slot_bytes, dtype=torch.uint8) for _ in range(count)]
        for expert, blob in zip(new, blobs, strict=False):
            blob[:8].view(torch.int64)[0] = layer * EXPERTS + expert
        with contextlib.suppress(KeyboardInterrupt), interrupted(after=place) as f:
            pool.exchange(layer, old[:count], new[:count], blobs)
        self.interrupted |= bool(f.hits)
        if f.hits:
            self.stale.add(layer)

    @rule(layer=st.integers(0, LAYERS - 1), expert=st.integers(0, EXPERTS - 1))
    def start_copy(self, layer, expert):
        if self.pool.held[layer, expert]:
            return
        slot = self.pool.take(layer, expert)
        if slot is not None:
            self.slot_tag(slot)[0] = -1  # half written
            self.filling[slot] = (layer, expert)

    @precondition(lambda self: self.filling)
    @rule()
    def finish_copy(self):
        slot, (layer, expert) = self.filling.popitem()
        self.slot_tag(slot)[0] = layer * EXPERTS + expert
        self.pool.load(layer, expert, slot)

    @rule(layer=st.integers(0, LAYERS - 1), expert=st.integers(0, EXPERTS - 1))
    def evict(self, layer, expert):
        if self.pool.held[layer, expert] and self.pool.slot_of[layer, expert] >= 0:
            self.pool.evict(layer, expert)

    @invariant()
    def what_kernels_can_reach_is_complete(self):
        base, size = self.pool.memory.data_ptr(), self.pool.slot_bytes
        for layer in set(range(LAYERS)) - self.unpublished:
            for expert, address in enumerate(self.pool.address[layer].tolist()):
                if address:
                    slot = (address - base) // size
                    assert slot not in self.filling
                    assert int(self.slot_tag(slot)[0]) == layer * EXPERTS + expert

    @invariant()
    def slots_are_neither_lost_nor_doubled(self):
        visible = self.pool.slot_of[self.pool.slot_of >= 0].tolist()
        arriving = [slot for mail in self.pool._mail for _, slot in mail.arriving]
        reclaimed = [slot for slot, _ in self.pool._reclaimed]
        freed = [slot for mail in self.pool._mail for slot in mail.freed]
        everywhere = visible + arriving + reclaimed + freed + list(self.filling)
        assert len(set(everywhere)) == len(everywhere)
        assert self.interrupted or sorted(everywhere) == list(range(SLOTS))
        leaving = sum(len(mail.leaving) for mail in self.pool._mail)
        balance = self.pool.loads - self.pool.evictions
        assert self.interrupted or balance == len(arriving) + len(visible) - leaving

    @invariant()
    def held_is_resident_or_coming(self):
        """Once the host knows of every exchange."""
        if self.unknown or self.interrupted:
            return
        coming = set(self.filling.values())
        for layer, mail in enumerate(self.pool._mail):
            coming |= {(layer, expert) for expert, _ in mail.arriving}
            for expert in range(EXPERTS):
                here = self.pool.slot_of[layer, expert] >= 0 and expert not in mail.leaving
                assert self.pool.held[layer, expert] == (here or (layer, expert) in coming)

    @invariant()
    def what_is_told_to_be_resident_can_be_reached(self):
        """From the next pass of its layer on."""
        for layer in range(LAYERS):
            mail = self.pool._mail[layer]
            reached = self.pool.address[layer].numpy() != 0
            known = not mail.unseen and not self.unknown
            assert not known or np.array_equal(self.pool.slot_of[layer] >= 0, reached)


class InterruptedProtocol(SlotProtocol):
    """With Ctrl-C in the forward thread, after which a slot may be lost, and no more."""

    @precondition(lambda self: self.unknown)
    @rule(place=st.integers(0, 20))
    def learning_is_interrupted(self, place):
        layer, newcomer, victim = self.unknown.pop(0)
        rows = np.array([[layer, newcomer, victim]])
        with contextlib.suppress(KeyboardInterrupt), interrupted(after=place) as f:
            self.pool.exchanged(*rows.T)
        self.interrupted |= bool(f.hits)
        if self.pool.slot_of[layer, victim] >= 0:  # as spac.pull asks
            self.pool.exchanged(*rows.T)
        assert self.pool.held[layer, newcomer] and self.pool.slot_of[layer, newcomer] >= 0

    @rule(layer=st.none() | st.integers(0, LAYERS - 1), place=st.integers(0, 30))
    def forward_is_interrupted(self, layer, place):
        self.learn()
        with contextlib.suppress(KeyboardInterrupt), interrupted(after=place) as f:
            self.publish(layer)
        self.interrupted |= bool(f.hits)
        if f.hits:
            self.stale |= set(range(LAYERS) if layer is None else [layer])

    @rule(layer=st.integers(0, LAYERS - 1), place=st.integers(0, 30), data=st.data())
    def prefill_is_interrupted(self, layer, place, data):
        self.prefill_exchanges(layer, data, place)


for protocol in (SlotProtocol, InterruptedProtocol):
    protocol.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSlotProtocol = SlotProtocol.TestCase
TestInterruptedProtocol = InterruptedProtocol.TestCase


NEW, OLD = indices([(0, 4)]), indices([(0, 2)])


def resident(device):
    """A pool of one slot, with expert 2 in it, and no kernel that reads."""
    pool = SlotPool([LAYOUT], 1, torch.device(device))
    pool.load(0, 2, pool.take(0, 2))
    pool.publish()
    pool.quiet = True
    return pool


def test_a_window_waits_for_a_copy_that_has_begun_and_lets_none_begin():
    pool, begun, go, shown = resident("cpu"), *(threading.Event() for _ in range(3))

    def copy(layers, experts, slots):
        begun.set()
        assert go.wait(30)

    def window():
        pool.publish(0)
        shown.set()

    copying = threading.Thread(target=pool.replace, args=(NEW, OLD, copy))
    copying.start()
    assert begun.wait(30)
    forward = threading.Thread(target=window)
    forward.start()
    assert not shown.wait(0.05) and int(pool.address[0, 2]) != 0
    go.set()
    forward.join(30)
    copying.join(30)
    assert pool.address[0].nonzero().tolist() == [[4]]
    assert not pool.replace(indices([(0, 1)]), NEW, copy).any()


def test_a_copy_that_fails_costs_the_slot_and_nothing_else():
    def copy(layers, experts, slots):
        raise OSError("bus error")

    pool = resident("cpu")
    with pytest.raises(OSError, match="bus error"):
        pool.replace(NEW, OLD, copy)
    pool.publish()
    assert not pool.address.any() and not pool.held.any() and (pool.slot_of == -1).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_wait_for_what_was_replaced():
    pool = resident("cuda")
    blob = torch.full((pool.slot_bytes,), 7, dtype=torch.uint8).pin_memory()

    def copy(layers, experts, slots):
        with torch.cuda.stream(pool.stream):
            torch.cuda._sleep(50_000_000)
            pool.memory[int(slots[0])].copy_(blob, non_blocking=True)

    assert pool.replace(NEW, OLD, copy).all()
    assert not pool.stream.query()
    pool.publish()
    assert (pool.memory[0].clone() == 7).all() and int(pool.address[0, 4])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_take_waits_for_kernels_that_read_the_slot():
    pool = SlotPool([LAYOUT], 1, torch.device("cuda"))
    slot = pool.take(0, 2)
    pool.load(0, 2, slot)
    pool.publish(0)
    assert int(pool.address[0, 2]) == pool.memory.data_ptr()
    reading = torch.cuda.Event()
    torch.cuda._sleep(50_000_000)  # a kernel that is still reading
    reading.record()
    pool.evict(0, 2)
    pool.publish(0)
    assert not reading.query()
    assert pool.take(0, 3) == slot
    assert reading.query()
    assert np.array_equal(pool.address.cpu().numpy(), np.zeros((1, EXPERTS)))
