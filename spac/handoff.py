"""Hand-over of a layer's window to the CPU and back without the host program: flags and a worker.

The device writes a window's ids, weights and hidden rows to pinned memory, then bell[layer] =
2 n + 1 (n counts windows from 1). A C++ thread that waits for the bell (csrc/worker.h) computes,
writes the rows back, then sets done[layer] = n; the device waits for that and adds the rows. The
rows of all layers share one place: layer l + 1 sends only after it has taken the answer of layer l.
If the CPU has nothing to do in a layer, the bell is 2 n and nobody waits for the other. On a
machine without a GPU the same protocol runs with the device's part in torch (tests).
"""

from __future__ import annotations

import ctypes
import time

import numpy as np
import torch
from torch import Tensor

from spac import ops
from spac.layout import ExpertTable

_HOOK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64)


def before_answer(layer: int) -> None:
    """Nothing; `spac.testing` puts its faults here, and the worker calls it only then."""


_untouched = before_answer


class HandOff:
    """Buffers for windows of up to `tokens` rows [T, H] of `dtype`, and the worker.

    tables: the experts of every layer in host memory. Pairs whose id is -1 are the device's own.
    """

    def __init__(
        self,
        tables: list[ExpertTable],
        tokens: int,
        top_k: int,
        dtype: torch.dtype,
        waited: Tensor,
        limit_s: float = 3.0,
    ) -> None:
        """waited int32 [L], on the device: microseconds that it waited for each layer's answer in
        the last window."""
        from spac import _C  # noqa: F401  (loads the operators)

        device = waited.device
        pin = device.type == "cuda"

        def host(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, pin_memory=pin)

        hidden = tables[0].layout.hidden
        self.device, self.limit_s = device, limit_s
        self._flags = host(2, len(tables), dtype=torch.int32)
        self.bell, self.done = self._flags
        self.failed = host(1, dtype=torch.int32)
        self._hidden = host(tokens, hidden, dtype=dtype)
        self._ids = host(tokens, top_k, dtype=torch.int32)
        self._weights = host(tokens, top_k, dtype=torch.float32)
        self._back = host(tokens, hidden, dtype=torch.float32)
        # Of each layer in the last window: time.perf_counter_ns() when the worker began and ended.
        self.times = torch.zeros(len(tables), 2, dtype=torch.int64)
        # What the host reads between two windows, without torch: that is ten times as fast.
        self._answers, self._given_up, self._clock = (
            t.numpy() for t in (self.done, self.failed, self.times)
        )
        self._window = torch.zeros(1, dtype=torch.int32, device=device)
        self._arrived = torch.zeros(1, dtype=torch.int32, device=device)  # programs that have sent
        # The last window that the device has taken each layer's answer of.
        self._seen = torch.zeros(len(tables), dtype=torch.int32, device=device)
        self._waited = waited
        self._count = 0
        self._cause: BaseException | None = None
        self._hook = _HOOK(self._call_hook)
        self._hook_address = ctypes.cast(self._hook, ctypes.c_void_p).value
        self._tables = tables
        self._worker = torch.ops.spac.worker_new(
            self._flags, self._hidden, self._ids, self._weights, self._back, self.times, pin
        )
        for table in tables:
            torch.ops.spac.worker_add_layer(self._worker, *table.for_cpu())
        torch.ops.spac.worker_start(self._worker)

    def begin(self, width: int) -> None:
        """A window of `width` rows: every layer sends and joins once, in order."""
        # The worker counts, so that both agree on the number also after Ctrl-C in between.
        self._count = torch.ops.spac.worker_begin(
            self._worker, width, self._hook_address if before_answer is not _untouched else 0
        )
        self._window.fill_(self._count)

    def send(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Give the worker its pairs; returns at once."""
        width = hidden.shape[0]
        host = self._hidden[:width], self._ids[:width], self._weights[:width]
        if self.device.type == "cuda":
            from spac.kernels.handoff import send as launch

            flags = self.bell, self._window, self._arrived
            launch(hidden, ids, weights, host, *flags, layer)
            return
        some = bool((ids >= 0).any())
        if some:
            for target, source in zip(host, (hidden, ids, weights), strict=True):
                target.copy_(source)
        # A plain store: x86 keeps it behind the rows.
        self.bell[layer] = 2 * self._window[0] + int(some)

    def join(self, layer: int, partial: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """partial [T, H] plus the worker's rows, in `dtype`, once they are there. ids: as sent."""
        rest = self._back[: partial.shape[0]]
        if self.device.type == "cuda":
            from spac.kernels.handoff import join as launch

            flags = self.done, self.failed, self._window, self._seen, self._waited
            return launch(partial, rest, ids, dtype, *flags, layer)
        if not bool((ids >= 0).any()):
            self._waited[layer] = 0
            return partial.to(dtype)
        limit = 0.0 if int(self.failed) else self.limit_s
        start = time.perf_counter()
        if not torch.ops.spac.wait_flag(self.done, layer, int(self._window), limit):
            self.failed.fill_(1)
        self._waited[layer] = int(1e6 * (time.perf_counter() - start))
        return ops.combine([partial, rest], dtype)

    def check(self) -> None:
        """After a window has ended: RuntimeError if the worker failed or did not answer in time."""
        if self._answers[0] > self._count:  # a worker that has failed answers whatever may come
            # Asked only now: torch (2.10 to 2.13) never frees a string that an operator returns.
            reason = self._cause or torch.ops.spac.worker_error(self._worker)
            raise RuntimeError(f"spac: the CPU side failed: {reason}") from self._cause
        if self._given_up[0]:
            raise RuntimeError("spac: the CPU side did not answer in time; detach and attach again")

    def take_times(self) -> np.ndarray:
        """`times` in seconds, once: 0 from here on."""
        times = self._clock * 1e-9
        self._clock[:] = 0
        return times

    def close(self) -> None:
        """Stop the worker; no window may be running."""
        torch.ops.spac.worker_stop(self._worker)

    def _call_hook(self, layer: int) -> int:
        try:
            before_answer(layer)
        except BaseException as error:  # for `check`: it cannot pass through the worker
            self._cause = error
            return 1
        return 0
