"""Captures a forward in CUDA graphs."""

from __future__ import annotations

from typing import Any

import torch


class Recorder:
    """A capture in one CUDA graph, or in several that `cut` separates, to be launched in order: one
    runs while the next is launched."""

    def __init__(self, pool: Any, stream: torch.cuda.Stream) -> None:
        """pool, stream: memory of the graphs, and where they are captured."""
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self._pool, self._stream = pool, stream

    def __enter__(self) -> Recorder:
        self.graphs.append(torch.cuda.CUDAGraph())
        # The copy thread and the worker go on calling CUDA meanwhile.
        mode = "thread_local"
        self._before = torch.cuda.current_stream()
        self._capture = torch.cuda.graph(self.graphs[-1], self._pool, self._stream, mode)
        self._capture.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """What fails inside makes the end of the capture fail, which would hide it, be it Ctrl-C,
        and leave the capture's stream the current one."""
        try:
            self._capture.__exit__(*error)
        except RuntimeError:
            if error[0] is None:
                raise
        finally:
            torch.cuda.set_stream(self._before)

    def cut(self, *_: Any) -> None:
        """Go on in another graph; a forward hook, too."""
        self.__exit__(None, None, None)
        self.__enter__()
