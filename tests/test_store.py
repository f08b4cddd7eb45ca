"""The host store's memory: pages of its own, page-locked on a GPU machine."""

import gc
import mmap
import random

import pytest
import torch

from spac.layout import ExpertLayout
from spac.store import HostStore, host_memory

SIZES = [1, mmap.PAGESIZE + 1, (2 << 20) + 12345]


@pytest.mark.parametrize("nbytes", SIZES)
def test_host_memory_is_zero_and_starts_a_page(nbytes):
    a, b = host_memory(nbytes), host_memory(nbytes)
    for tensor in (a, b):
        assert tensor.shape == (nbytes,) and not tensor.any()
        assert tensor.data_ptr() % (mmap.PAGESIZE if nbytes < 2 << 20 else 2 << 20) == 0
    first, second = sorted((a.data_ptr(), b.data_ptr()))
    assert second // mmap.PAGESIZE > (first + nbytes - 1) // mmap.PAGESIZE  # no page is shared
    a.fill_(7)
    assert not b.any()


def test_host_memory_that_does_not_exist_is_one_line():
    with pytest.raises(MemoryError, match="cannot map .* bytes of host memory"):
        host_memory(1 << 60)


def test_views_keep_the_memory_alive():
    view = host_memory(3 << 20)[-5:]
    gc.collect()
    view.fill_(3)
    assert view.sum() == 15


def layouts(count):
    sizes = [(random.randint(1, 40), random.randint(1, 40)) for _ in range(count)]
    return [ExpertLayout(3, hidden, inter, torch.float32) for hidden, inter in sizes]


@pytest.mark.parametrize("intermediate", [3, 1500], ids=["small pages", "huge pages"])
def test_views_lie_where_the_tables_point(intermediate):
    layout = ExpertLayout(3, 64, intermediate, torch.float32, bias=True)
    store = HostStore([layout], pin=False)
    weights = {name: torch.randn(3, *shape) for name, (_, shape) in layout.sections().items()}
    parameters = {name: torch.nn.Parameter(weight.clone()) for name, weight in weights.items()}
    store.adopt(parameters)
    base = store.blobs[0].data_ptr()
    assert base % (2 << 20) == 0 or store.nbytes < 2 << 20
    table = store.table(0)
    assert parameters["gate_up"].data_ptr() == base == table.address[0]
    assert parameters["down"].data_ptr() == base + table.down_offset
    for expert, blob in enumerate(store.blobs[0].view(torch.float32)):
        for name, (offset, shape) in layout.sections().items():
            held = blob[offset // 4 :][: torch.Size(shape).numel()].view(shape)
            assert torch.equal(held, weights[name][expert]), name
            assert torch.equal(held, parameters[name][expert])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page locks need CUDA")
def test_many_small_stores_lock_their_pages():
    stores = [HostStore(layouts(2), pin=True) for _ in range(5)]
    for store in stores:
        for _ in store.layouts:
            assert store.allocate().is_pinned()
    for store in stores:
        store.close()
    assert not store.blobs[0].is_pinned()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page locks need CUDA")
def test_a_refused_page_lock_is_one_line_and_leaves_cuda_usable():
    store = HostStore(layouts(1), pin=True)
    blobs = store.allocate()
    with pytest.raises(MemoryError, match=r"cannot page-lock \d+ bytes .*CUDA error 712"):
        store._register(blobs)
    assert torch.ones(3, device="cuda").sum() == 3
    store.close()


class Runtime:
    """What is page-locked, by address; during a capture nothing can be unlocked."""

    locked: dict[int, int]
    capturing = False

    def cudaHostRegister(self, address, nbytes, flags):
        self.locked[address] = nbytes
        return 0

    def cudaHostUnregister(self, address):
        return 900 if self.capturing else int(self.locked.pop(address, None) is None)


@pytest.fixture
def runtime(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(Runtime, "locked", {}, raising=False)
    monkeypatch.setattr("spac.store._clear_cuda_error", lambda: None)
    return Runtime


def test_a_store_that_dies_unlocks_its_pages_first(runtime):
    store = HostStore(layouts(2), pin=True)
    for _ in store.layouts:
        store.allocate()
    assert len(runtime.locked) == 2
    store.cycle = store  # as a model and its engine are
    del store
    gc.collect()
    assert not runtime.locked


def test_pages_that_cannot_be_unlocked_stay_mapped_until_they_can(runtime, monkeypatch):
    first = HostStore(layouts(1), pin=True)
    address = first.allocate().data_ptr()
    monkeypatch.setattr(runtime, "capturing", True)
    first.close()
    del first
    assert list(runtime.locked) == [address]
    monkeypatch.setattr(runtime, "capturing", False)
    second = HostStore(layouts(1), pin=True)
    second.allocate()  # the first is unlocked behind its back
    assert address not in runtime.locked or address == second.blobs[0].data_ptr()
    assert len(runtime.locked) == 1
    second.close()
    assert not runtime.locked
