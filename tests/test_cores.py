"""How many cores there are, and who sets the threads of the CPU's FFN."""

import os

import pytest
import torch

from spac import cores as module
from spac.config import SpacConfig


@pytest.fixture
def threads(monkeypatch):
    asked = []
    from spac import _C  # noqa: F401

    monkeypatch.setattr(torch.ops.spac, "set_cpu_threads", asked.append)
    return asked


def test_cores_are_those_of_the_process(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_QUOTA", tmp_path / "none")
    assert 1 <= module.cores() <= len(os.sched_getaffinity(0))
    monkeypatch.setattr(module, "_CPUS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert module.cores() == 8
    for cpu in range(8):  # hyperthreads in pairs
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}")
    assert module.cores() == 4
    monkeypatch.setattr(module, "_QUOTA", tmp_path / "cpu.max")
    for quota, expected in (("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(quota)
        assert module.cores() == expected


def test_threads(threads, monkeypatch):
    monkeypatch.setattr(module, "cores", lambda: 6)
    assert module.set_ffn_threads(None, gpu=False) == torch.get_num_threads() and not threads
    assert module.set_ffn_threads(None, gpu=True) == 5
    assert module.set_ffn_threads(3, gpu=False) == 3
    monkeypatch.setattr(module, "cores", lambda: 1)
    assert module.set_ffn_threads(None, gpu=True) == 1
    assert threads == [5, 3, 1]


@pytest.mark.parametrize("count", [0, -1, 2000])
def test_a_bad_number_is_refused(count):
    with pytest.raises(ValueError, match="cpu_threads: expected 1..1024"):
        SpacConfig(cpu_threads=count)
