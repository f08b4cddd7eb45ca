"""Memory over several NUMA nodes, as far as a machine with one can show it."""

import mmap

import pytest
import torch

from spac import numa
from spac.store import host_memory


@pytest.mark.parametrize(
    "text, expected", [("", set()), ("0", {0}), ("0-1", {0, 1}), ("0-2,5\n", {0, 1, 2, 5})]
)
def test_lists_of_nodes(text, expected):
    assert numa._parse(text) == expected


def test_nodes_are_those_that_the_process_may_use(tmp_path, monkeypatch):
    assert numa.nodes()
    (tmp_path / "has_memory").write_text("0,64-65\n")
    monkeypatch.setattr(numa, "_NODES", tmp_path / "has_memory")
    assert numa.nodes() == [0]  # the others are not allowed, or not there
    monkeypatch.setattr(numa, "_NODES", tmp_path / "absent")
    assert numa.nodes() == [0]


def test_the_system_takes_the_call():
    """With the nodes of this machine named twice, since one alone is not spread."""
    memory = mmap.mmap(-1, 4 << 20)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    here = numa.nodes()
    done = numa.interleave(tensor.data_ptr(), len(memory), here * 2)
    if done:
        tensor.fill_(7)
        assert bool((tensor == 7).all())
    assert not numa.interleave(tensor.data_ptr(), len(memory), here[:1])
    assert not numa.interleave(tensor.data_ptr(), len(memory), [0, 4000])  # no such node


def test_host_memory_asks_for_it(monkeypatch):
    asked = []
    monkeypatch.setattr("spac.store.interleave", lambda *a: asked.append(a))
    small, large = host_memory(1000), host_memory((4 << 20) + 5)
    assert asked == [(large.data_ptr(), 4 << 20)]
    assert large.data_ptr() % (2 << 20) == 0 and not small.any() and not large.any()
