"""The host store: every expert's weights, once, in host memory, one contiguous blob per expert."""

from __future__ import annotations

import contextlib
import mmap
import weakref

import torch
from torch import Tensor, nn

from spac.experts import stored_view
from spac.layout import ExpertLayout, ExpertTable
from spac.numa import interleave
from spac.quantize import dequantize, quantize

_PORTABLE_MAPPED = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped
_HUGE_PAGE = 2 << 20  # bytes
_locked: list[Tensor] = []  # that could not be unlocked, as nothing can during a capture


def host_memory(nbytes: int) -> Tensor:
    """Zeros uint8 [nbytes] in a mapping of their own, given back when the tensor dies.

    Whole pages, so that page-locking one store never meets a page of another; huge ones where the
    system gives them to who asks, since the CPU kernels stream the weights, from all NUMA nodes.
    """
    spare = _HUGE_PAGE if nbytes >= _HUGE_PAGE else 0
    try:
        memory = mmap.mmap(-1, nbytes + spare, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        reason = f"host store: cannot map {nbytes} bytes of host memory ({error})"
        raise MemoryError(reason) from None
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    if spare and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    tensor = tensor[-tensor.data_ptr() % max(spare, 1) :][:nbytes]
    if spare:
        interleave(tensor.data_ptr(), nbytes // _HUGE_PAGE * _HUGE_PAGE)
    return tensor


def blob_views(blobs: Tensor, layout: ExpertLayout) -> dict[str, Tensor]:
    """The sections of the experts in `blobs` uint8 [E, blob_bytes]: [E, ...] row-major, strided."""
    views = {}
    for name, (offset, shape) in layout.sections().items():
        dtype = layout.section_dtype(name)
        flat = blobs.view(dtype)
        strides = torch.empty(shape, device="meta").stride()
        views[name] = flat.as_strided(
            (blobs.shape[0], *shape),
            (flat.stride(0), *strides),
            # huge pages: blobs start inside a mapping
            flat.storage_offset() + offset // dtype.itemsize,
        )
    return views


class HostStore:
    """Blobs of all layers, page-locked when `pin` (so that copies and kernels can reach them).

    A layer's parameters are moved in by `adopt`, which then points them at the blobs: the model
    keeps working and there is no second copy. `restore` undoes it. Of quantised layouts, parameters
    cannot point at the blobs: they are NaN meanwhile, without memory, and come back rounded.
    """

    def __init__(
        self, layouts: list[ExpertLayout], pin: bool, sources: list[ExpertLayout] | None = None
    ) -> None:
        """sources: the layouts of the parameters, where they differ from those of the blobs."""
        self.layouts, self.sources = layouts, sources or layouts
        self.blobs: list[Tensor] = []
        self._inference: set[int] = set()  # ids of parameters made in inference mode
        self._pin = pin
        self._pinned: list[Tensor] = []
        # Also when a model dies attached: pages that are unmapped while they are locked stay so,
        # and the next mapping at their address cannot be locked.
        self._unlock = weakref.finalize(self, _unlock, self._pinned)
        self._unlock.atexit = False  # CUDA may be gone by then

    def allocate(self) -> Tensor:
        """Zeroed blobs uint8 [E, blob_bytes] for the next layer, page-locked if this store is."""
        layout = self.layouts[len(self.blobs)]
        blobs = host_memory(layout.num_experts * layout.blob_bytes)
        if self._pin:
            self._register(blobs)
        self.blobs.append(blobs.view(layout.num_experts, layout.blob_bytes))
        return self.blobs[-1]

    def adopt(self, parameters: dict[str, nn.Parameter]) -> None:
        """Move the next layer's weights in; `parameters` as from `expert_parameters`."""
        layer = len(self.blobs)
        layout = self.layouts[layer]
        self._inference |= {id(p) for p in parameters.values() if p.is_inference()}
        if layout.form != "float":
            return self._adopt_quantized(layer, parameters)
        self.allocate()
        for name, view in self.views(layer).items():
            parameter = parameters[name]
            view.copy_(stored_view(parameter.data, name, layout))
            parameter.data = stored_view(view, name, layout)

    def _adopt_quantized(self, layer: int, parameters: dict[str, nn.Parameter]) -> None:
        layout, source = self.layouts[layer], self.sources[layer]
        rows = {name: stored_view(p.data, name, source) for name, p in parameters.items()}
        try:
            self.allocate()
            views = self.views(layer)
            for e in range(layout.num_experts):
                one = quantize({name: t[e] for name, t in rows.items()}, layout)
                for name, section in one.items():
                    views[name][e].copy_(section)
        except BaseException:
            del self.blobs[layer:]  # its parameters still have their weights
            raise
        for parameter in parameters.values():
            nan = torch.full((1,) * parameter.dim(), torch.nan, dtype=parameter.dtype)
            parameter.data = nan.expand(parameter.shape)

    def restore(
        self, layer: int, parameters: dict[str, nn.Parameter], device: torch.device
    ) -> None:
        """Give a layer's parameters memory of their own again, on `device`."""
        layout, source = self.layouts[layer], self.sources[layer]
        for parameter in parameters.values():
            # With data of the other kind torch could no longer make views of it.
            with torch.inference_mode(id(parameter) in self._inference):
                own = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                if layout.form == "float":
                    own.copy_(parameter.data)
                parameter.data = own
        if layout.form == "float":
            return
        rows = {name: stored_view(p.data, name, source) for name, p in parameters.items()}
        views = self.views(layer)
        with torch.inference_mode():  # where parameters of either kind may be written
            for e in range(layout.num_experts):
                one = dequantize({name: view[e] for name, view in views.items()}, layout)
                for name, weights in one.items():
                    rows[name][e].copy_(weights)

    def views(self, layer: int) -> dict[str, Tensor]:
        """The weights of a layer inside its blobs, [E, ...] row-major and strided."""
        return blob_views(self.blobs[layer], self.layouts[layer])

    def table(self, layer: int) -> ExpertTable:
        """Every expert of the layer where it lies in host memory; addresses on the CPU."""
        layout, blobs = self.layouts[layer], self.blobs[layer]
        address = blobs.data_ptr() + blobs.stride(0) * torch.arange(layout.num_experts)
        return ExpertTable.from_blobs(layout, address, owner=blobs)

    @property
    def nbytes(self) -> int:
        return sum(b.nbytes for b in self.blobs)

    def _register(self, blobs: Tensor) -> None:
        _unlock([_locked.pop() for _ in range(len(_locked))])
        self._pinned.append(blobs)  # first: Ctrl-C behind the call may not forget the lock
        status = torch.cuda.cudart().cudaHostRegister(
            blobs.data_ptr(), blobs.nbytes, _PORTABLE_MAPPED
        )
        if int(status) != 0:
            self._pinned.pop()
            _clear_cuda_error()
            raise MemoryError(
                f"host store: cannot page-lock {blobs.nbytes} bytes of host memory "
                f"(CUDA error {int(status)}); free memory or raise the locked-memory limit"
            )

    def close(self) -> None:
        """Release the page locks; nothing may be copying from the store any more."""
        _unlock(self._pinned)


def _unlock(pinned: list[Tensor]) -> None:
    while pinned:
        if int(torch.cuda.cudart().cudaHostUnregister(pinned[-1].data_ptr())) != 0:
            _clear_cuda_error()
            _locked.append(pinned[-1])  # else the next mapping at its address could not be locked
        pinned.pop()


def _clear_cuda_error() -> None:
    """CUDA reports a failed call again at the next kernel launch: launch one that may fail."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")
