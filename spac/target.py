"""Forwards of the models in the speculative loop: eager, or over a static KV cache.

The static path captures the whole forward over W tokens in CUDA graphs, once for each W: attention,
router, verify kernel, resident FFN, hand-over to the CPU and the wait for it. The host program
launches them and reads the accepted tokens. Rejected tokens are forgotten by moving the cache's
length back.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from spac.attention import grouped
from spac.capture import Recorder
from spac.decoder import MOST_TOKENS, can_run, decoder_layers, few_launches
from spac.engine import Engine
from spac.fuse import fused
from spac.prefill import PREFILL_CHUNK

_LENGTH_ALIGN = 64  # of a static cache: attention kernels read masks in aligned pieces
_FUSE_LAYERS = 16
# With these layers, and the last one, begins another CUDA graph of a window: each of the first ones
# lasts as long as to launch the next.
CUTS = 1, 5
log = logging.getLogger("spac")
_capturing = threading.Lock()  # graphs of models in different threads: one capture at a time


class Target(Protocol):
    """Keeps the KV cache of one generation."""

    def prefill(self, tokens: Tensor) -> Tensor:
        """Feed the prompt int64 [n]; logits [1, V] of its last token."""
        ...

    def prepare(self, width: int) -> float:
        """Make what windows of `width` tokens need, once; the seconds that it took."""
        ...

    def verify(self, window: Tensor) -> Tensor:
        """Feed int64 [W]; logits [W, V], valid until the next call."""
        ...

    def read(self, outcome: Tensor) -> list[int]:
        """Numbers int64 [n] that were computed from the logits, on the host: the only wait."""
        ...

    def finish(self, rejected: int) -> None:
        """The host has read the window's outcome: forget its last `rejected` tokens."""
        ...


def keeps_state(model: PreTrainedModel) -> bool:
    """True for recurrent layers, whose state no token can be taken out of: draft nothing."""
    return bool(getattr(model, "_is_stateful", False))


class EagerTarget:
    """transformers' own forward over a growing cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.cache = model, DynamicCache(config=model.config)
        # Sliding layers keep all, as the mask sees to their window: what they have left cannot be
        # rolled back after several forwards (transformers before 5.18).
        self.cache.layers = [
            DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer
            for layer in self.cache.layers
        ]
        self._length = 0
        # Said, since vision models count on from the text they saw last.
        self._positions = "position_ids" in inspect.signature(model.forward).parameters

    def prefill(self, tokens: Tensor) -> Tensor:
        for chunk in tokens.split(PREFILL_CHUNK):
            logits = self._forward(chunk, keep=1)
        if not keeps_state(self.model):
            # Convolutions keep what they need; from here on until `finish` what was before, too.
            self.cache.activate_past_recording()
        return logits[-1:]

    def prepare(self, width: int) -> float:
        return 0.0

    def verify(self, window: Tensor) -> Tensor:
        return self._forward(window)

    def read(self, outcome: Tensor) -> list[int]:
        return outcome.tolist()

    def finish(self, rejected: int) -> None:
        self._length -= rejected
        if not keeps_state(self.model):
            self.cache.crop(-rejected)

    def _forward(self, tokens: Tensor, keep: int = 0) -> Tensor:
        positions = self._length + torch.arange(tokens.numel(), device=tokens.device)
        self._length += tokens.numel()
        out = self.model(
            input_ids=tokens[None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
            **({"position_ids": positions[None]} if self._positions else {}),
        )
        return out.logits[0]


class NotCapturable(ValueError):
    """The model, or this machine, cannot run the static path; says why."""


@dataclass
class _Window:
    """A forward over a fixed number of tokens; no graphs: run eagerly."""

    tokens: Tensor
    graphs: list[torch.cuda.CUDAGraph] = field(default_factory=list)  # to be launched in order
    logits: Tensor | None = None
    flags: bool = True  # hand over to the CPU by flags; False: the engine's eager way


class StaticTarget:
    """Windows over a static cache of at least `length` tokens; see the module text.

    engine: that of an attached model, or None. Without a GPU the same path runs without graphs.
    fuse: capture with the kernels of spac.decoder, for other models with compiled small operations
    (spac.fuse); None: the latter if there are layers enough to be worth the compilation. Raises
    NotCapturable.
    """

    def __init__(
        self, model: PreTrainedModel, engine: Engine | None, length: int, fuse: bool | None = None
    ) -> None:
        implementation = model.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise NotCapturable(f"attention {implementation!r} takes no explicit mask")
        length = -(-length // _LENGTH_ALIGN) * _LENGTH_ALIGN
        self.model, self.engine, self.length = model, engine, length
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        kinds = {type(layer) for layer in self.cache.layers}
        if kinds != {StaticLayer}:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise NotCapturable(f"its KV cache has layers that cannot be rolled back ({names})")
        # Fastest first; each changes the model as long as a capture lasts.
        self._ways: list[Callable[[PreTrainedModel], AbstractContextManager[None]]] = [nullcontext]
        if fuse or (fuse is None and len(self.cache.layers) >= _FUSE_LAYERS):
            self._ways.insert(0, fused)
        if fuse is not False and can_run(model):
            self._ways.insert(0, few_launches)
        self._own_lengths = False
        self._weights = _weights(model)  # that graphs read
        device = model.device
        # One tensor for all layers: forgetting is one launch.
        self._lengths = torch.zeros(len(self.cache.layers), dtype=torch.int64, device=device)
        for layer, view in zip(self.cache.layers, self._lengths, strict=True):
            layer.cumulative_length = view
        self._places = torch.arange(length, device=device)
        self._windows: dict[int, _Window] = {}
        self._pool: Any = None
        self._under_way = False  # graphs whose end the host has not seen
        if device.type == "cuda":
            self._open_captures()
            # A thread that spins takes a core from the CPU's FFN, one that sleeps wakes up late:
            # the host sleeps until the last layer begins, then it spins.
            layers = [] if engine is None else decoder_layers(model)
            self._cuts = [layers[i] for i in {*CUTS, len(layers) - 1} if 0 < i < len(layers)]
            self._nearly = torch.cuda.Event(blocking=True)
            self._ended = torch.cuda.Event()
            self._host = torch.empty(0, dtype=torch.int64)
        self.reasons: list[str] = []  # of windows that could not be captured

    @property
    def outdated(self) -> bool:
        """The model's weights were moved, converted or replaced since."""
        return self._weights != _weights(self.model)

    @property
    def captured(self) -> list[int]:
        """Widths that run as CUDA graphs."""
        return sorted(w for w, window in self._windows.items() if window.graphs)

    def reset(self) -> None:
        """Begin another text."""
        self._under_way = False  # what Ctrl-C has left
        self._lengths.zero_()

    def prefill(self, tokens: Tensor) -> Tensor:
        for chunk in tokens.split(PREFILL_CHUNK):
            logits = self._forward(chunk, keep=1)
        return logits[-1:]

    def prepare(self, width: int) -> float:
        if width in self._windows:
            return 0.0
        start = time.perf_counter()
        self._windows[width] = self._prepare(width)
        return time.perf_counter() - start

    def verify(self, window: Tensor) -> Tensor:
        width = window.numel()
        self.prepare(width)
        ready = self._windows[width]
        if ready.flags and self.engine is not None:
            self.engine.begin_window(width)
        if not ready.graphs or ready.logits is None:
            logits = self._run(window, ready.flags)
            if self.engine is not None:
                self.engine.launched()
            return logits
        ready.tokens.copy_(window)
        *most, last = ready.graphs
        for graph in most:
            graph.replay()
        if self.engine is not None:
            self._nearly.record()
            self._under_way = True
        last.replay()
        return ready.logits

    def read(self, outcome: Tensor) -> list[int]:
        if not outcome.is_cuda:
            return outcome.tolist()
        n = outcome.numel()
        if len(self._host) < n:
            self._host = torch.empty(n, dtype=torch.int64, pin_memory=True)
        self._host[:n].copy_(outcome, non_blocking=True)
        self._wait()
        return self._host.numpy()[:n].tolist()

    def _wait(self) -> None:
        """Until all that was launched has ended; while a window runs, the host has time."""
        self._ended.record()
        if self._under_way and self.engine is not None:
            self._under_way = False
            self.engine.launched()
            self._nearly.synchronize()
        self._ended.synchronize()

    def finish(self, rejected: int) -> None:
        if self._under_way:
            self._wait()
        if self.engine is not None:
            self.engine.check()
        if rejected:
            self._lengths.sub_(rejected)

    def _prepare(self, width: int) -> _Window:
        """Warm up, then capture, one thread at a time."""
        device = self.model.device
        window = _Window(torch.zeros(width, dtype=torch.int64, device=device))
        if self.engine is not None:
            self.engine.open_handoff(self.model.dtype)
        if device.type == "cuda":
            with _capturing:
                self._capture_or_not(window, width)
        return window

    def _capture_or_not(self, window: _Window, width: int) -> None:
        """In the fastest way that works; if none does, with a logged reason, not at all."""
        from triton.errors import TritonError

        ways = [w for w in self._ways if width <= MOST_TOKENS or w is not few_launches]
        for way in ways:
            try:
                with way(self.model):
                    self._capture(window, width, own_lengths=way is few_launches)
                return
            except BaseException as error:
                self._forget_capture()
                if not isinstance(error, (RuntimeError, TritonError)):
                    raise  # Ctrl-C
                reason = _first_line(error)
                if way is not ways[-1]:
                    self._ways.remove(way)
                    log.warning("spac: windows without %s: %s", way.__name__, reason)
        window.graphs, window.flags = [], False
        reason = f"windows of {width} tokens run eagerly: {reason}"
        self.reasons.append(reason)
        log.warning("spac: %s", reason)

    def _capture(self, window: _Window, width: int, own_lengths: bool) -> None:
        """Warm up, then capture; what the warm-up changed is put back.

        own_lengths: the layers leave the lengths of their cache to us.
        """
        self._own_lengths = own_lengths
        hooks: list[Any] = []
        collects = gc.isenabled()
        before = None if self.engine is None else self.engine.save()
        lengths = self._lengths.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        try:
            gc.disable()  # what it finds may unlock memory or free graphs, which a capture forbids
            with torch.cuda.stream(side):
                if self.engine is not None:
                    self.engine.begin_window(width)
                self._run(window.tokens, True)
            torch.cuda.synchronize()
            if self.engine is not None:
                self.engine.check()
            with Recorder(self._pool, self._stream) as recorder:
                for layer in self._cuts:
                    hooks.append(layer.register_forward_pre_hook(recorder.cut))
                window.logits = self._run(window.tokens, True)
            window.graphs = recorder.graphs
        finally:
            if collects:
                gc.enable()
            for hook in hooks:
                hook.remove()
            self._own_lengths = False
            self._lengths.copy_(lengths)
            if self.engine is not None and before is not None:
                self.engine.load(before)

    def _open_captures(self) -> None:
        """Memory and stream for captures that no other has used."""
        self._pool = torch.cuda.graph_pool_handle()
        # torch hands out the same 32 streams of a priority again and again: at this one no copy
        # thread is given the stream of a capture.
        self._stream = torch.cuda.Stream(self.model.device, priority=-1)

    def _forget_capture(self) -> None:
        """torch ends no capture that has failed: another one that holds sets its generator right,
        and memory and stream of the failed one are not used again."""
        self._open_captures()
        with contextlib.suppress(RuntimeError), Recorder(self._pool, self._stream):
            self._places.clone()

    def _run(self, tokens: Tensor, flags: bool) -> Tensor:
        if self.engine is None or not flags:
            return self._forward(tokens)
        try:  # no context manager: Ctrl-C may end one before its own `finally` is reached
            self.engine.by_flags = True
            return self._forward(tokens)
        finally:
            self.engine.by_flags = False

    def _forward(self, tokens: Tensor, keep: int = 0) -> Tensor:
        positions = self._lengths[0] + self._places[: tokens.numel()]
        hidden = self._places[None, :] > positions[:, None]
        dtype = self.model.dtype
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        mask.masked_fill_(hidden, torch.finfo(dtype).min)
        with grouped(self.model):
            logits = self.model(
                input_ids=tokens[None],
                position_ids=positions[None],
                attention_mask=mask[None, None],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=keep,
            ).logits[0]
        if self._own_lengths:
            self._lengths.add_(tokens.numel())
        return logits


def _weights(model: PreTrainedModel) -> list[tuple[int, torch.dtype]]:
    """Where the weights are, and what: a graph reads them there."""
    return [(t.data_ptr(), t.dtype) for t in (*model.parameters(), *model.buffers())]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
