"""Hand-over of a layer's window to the CPU and back without the host program: flags and a worker.

The device writes a window's ids, weights and hidden rows to pinned memory, then bell[layer] = n
(n counts windows from 1). A worker thread that waits for the bell computes, writes the rows back,
then sets done[layer] = n; the device waits for that and adds the rows. The rows of all layers share
one place: layer l + 1 sends only after it has taken the answer of layer l. On a machine without a
GPU the same protocol runs with the device's part in torch (tests).
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from spac import ops

Compute = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, hidden, ids, weights) -> rows
_NOW = 2**31 - 1  # a flag that nobody has to wait for: of a failed worker, of a bell that closes
_SLICE_S = 5.0  # an idle worker waits in slices of this


class HandOff:
    """Buffers for windows of up to `tokens` rows [T, H] of `dtype`, and the worker.

    compute(layer, hidden [T, H], ids int32 [T, k], weights fp32 [T, k]) -> fp32 [T, H] runs on the
    worker; pairs whose id is -1 are the device's own.
    """

    def __init__(
        self,
        layers: int,
        tokens: int,
        hidden: int,
        top_k: int,
        dtype: torch.dtype,
        device: torch.device,
        compute: Compute,
        limit_s: float = 3.0,
    ) -> None:
        pin = device.type == "cuda"

        def host(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, pin_memory=pin)

        self.layers, self.device, self.compute, self.limit_s = layers, device, compute, limit_s
        self.bell = host(layers, dtype=torch.int32)
        self.done = host(layers, dtype=torch.int32)
        self.failed = host(1, dtype=torch.int32)
        self._hidden = host(tokens, hidden, dtype=dtype)
        self._ids = host(tokens, top_k, dtype=torch.int32)
        self._weights = host(tokens, top_k, dtype=torch.float32)
        self._back = host(tokens, hidden, dtype=torch.float32)
        self._window = torch.zeros(1, dtype=torch.int32, device=device)
        self._count = 0
        self._width = 0
        self.error: BaseException | None = None
        self._closing = False
        self._threads = torch.get_num_threads()  # torch keeps it per thread
        self._worker = threading.Thread(target=self._serve, name="spac-cpu", daemon=True)
        self._worker.start()

    def begin(self, width: int) -> None:
        """A window of `width` rows: every layer sends and joins once, in order."""
        self._count += 1
        self._width = width
        self._window.fill_(self._count)

    def send(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Give the worker its pairs; returns at once."""
        width = hidden.shape[0]
        host = self._hidden[:width], self._ids[:width], self._weights[:width]
        if self.device.type == "cuda":
            from spac.kernels.handoff import send as launch

            launch(hidden, ids, weights, host, self.bell, self._window, layer)
            return
        for target, source in zip(host, (hidden, ids, weights), strict=True):
            target.copy_(source)
        self.bell[layer] = self._window[0]

    def join(self, layer: int, partial: Tensor, dtype: torch.dtype) -> Tensor:
        """partial [T, H] plus the worker's rows, in `dtype`, once they are there."""
        rest = self._back[: partial.shape[0]]
        if self.device.type == "cuda":
            from spac.kernels.handoff import wait as launch

            launch(self.done, self.failed, self._window, layer)
            return ops.combine([partial, rest], dtype)  # the kernel reads `rest` over PCIe
        limit = 0.0 if int(self.failed) else self.limit_s
        if not _reached(self.done, layer, int(self._window), limit):
            self.failed.fill_(1)
        return ops.combine([partial, rest], dtype)

    def check(self) -> None:
        """After a window has ended: RuntimeError if the worker failed or did not answer in time."""
        if self.error is not None:
            raise RuntimeError(f"spac: the CPU side failed: {self.error}") from self.error
        if int(self.failed):
            raise RuntimeError("spac: the CPU side did not answer in time; detach and attach again")

    def close(self) -> None:
        """Stop the worker; no window may be running."""
        self._closing = True
        self.bell.fill_(_NOW)
        self._worker.join()

    def _serve(self) -> None:
        window = 0
        try:
            torch.set_num_threads(self._threads)
            while True:
                window += 1
                for layer in range(self.layers):
                    while not _reached(self.bell, layer, window, _SLICE_S):
                        pass
                    if self._closing:
                        return
                    self._answer(layer)
                    self.done[layer] = window
        except BaseException as error:  # reported by `check`
            self.error = error
            self.done.fill_(_NOW)

    def _answer(self, layer: int) -> None:
        width = self._width
        ids, back = self._ids[:width], self._back[:width]
        if int(ids.max()) < 0:
            back.zero_()
            return
        back.copy_(self.compute(layer, self._hidden[:width], ids, self._weights[:width]))


def _reached(flags: Tensor, index: int, value: int, seconds: float) -> bool:
    """Wait until flags[index] >= value, for so long at most; other Python threads run meanwhile."""
    from spac import _C  # noqa: F401  (loads the operators)

    return torch.ops.spac.wait_flag(flags, index, value, seconds)
