"""llama.cpp's expert FFN, through the ggml libraries that llama-cpp-python brings."""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spac.store import host_memory

# enum ggml_type
F32, F16, I32, BF16 = 0, 1, 26, 30
TYPES = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16, torch.int32: I32}
GRAPH_BYTES = 1 << 20  # of a graph and its tensors, without their data
Pointer = ctypes.c_void_p


class _InitParams(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("buffer", Pointer), ("no_alloc", ctypes.c_bool)]


class Ggml:
    """The functions of ggml in use; ImportError if llama-cpp-python is not there."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise ImportError("No module named 'llama_cpp'")
        folder = Path(spec.origin).parent / "lib"
        try:
            libraries = [
                ctypes.CDLL(str(folder / f"libggml{part}.so"), mode=ctypes.RTLD_GLOBAL)
                for part in ("-base", "-cpu")
            ]
        except OSError as error:
            raise ImportError(f"llama_cpp has no ggml of its own: {error}") from None
        self._libraries = libraries

    def __call__(self, name: str, *arguments: object) -> int:
        for library in self._libraries:
            if hasattr(library, name):
                function = getattr(library, name)
                function.restype = Pointer
                return function(*arguments) or 0
        raise ImportError(f"llama_cpp: its ggml has no {name}")


class Context:
    """Memory of ggml: tensors are made in it and die with it."""

    def __init__(self, ggml: Ggml, nbytes: int) -> None:
        self.ggml, self.memory = ggml, host_memory(nbytes)
        self.pointer = Pointer(
            ggml("ggml_init", _InitParams(nbytes, self.memory.data_ptr(), False))
        )

    def __call__(self, name: str, *arguments: object) -> Pointer:
        return Pointer(self.ggml(name, self.pointer, *arguments))

    def tensor(self, like: Tensor) -> tuple[Pointer, Tensor]:
        """A tensor of this shape [a, b, c], and a view of its data."""
        sizes = [ctypes.c_int64(n) for n in reversed(like.shape)]
        made = self("ggml_new_tensor_3d", TYPES[like.dtype], *sizes)
        return made, self.data(made, like)

    def data(self, made: Pointer, like: Tensor) -> Tensor:
        start = self.ggml("ggml_get_data", made) - self.memory.data_ptr()
        nbytes = like.numel() * like.element_size()
        return self.memory[start : start + nbytes].view(like.dtype).view(like.shape)

    def __del__(self) -> None:
        self.ggml("ggml_free", self.pointer)


@dataclass
class Graph:
    """One shape of call: its operations, and where the inputs and the output lie."""

    context: Context
    operations: Pointer
    x: Tensor
    ids: Tensor
    weights: Tensor
    y: Tensor


class Experts:
    """y = experts(x, ids, weights) for copies of gate_up [E, 2I, H] and down [E, H, I].

    A graph is built for each shape of the tokens, and kept.
    """

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        self.ggml, self.sizes = Ggml(), down.shape[1:]
        self.backend = Pointer(self.ggml("ggml_backend_cpu_init"))
        nbytes = sum(t.numel() * t.element_size() for t in (gate_up, down))
        self.store = Context(self.ggml, nbytes + GRAPH_BYTES)
        self.gate_up, copy = self.store.tensor(gate_up)
        copy.copy_(gate_up)
        self.down, copy = self.store.tensor(down)
        copy.copy_(down)
        self.graphs: dict[tuple[int, ...], Graph] = {}

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        shape = tuple(ids.shape)
        if shape not in self.graphs:
            self.graphs[shape] = self._build(*shape)
        graph = self.graphs[shape]
        graph.x.copy_(x[:, None])
        graph.ids.copy_(ids[None])
        graph.weights.copy_(weights[..., None])
        self.ggml("ggml_backend_cpu_set_n_threads", self.backend, torch.get_num_threads())
        self.ggml("ggml_backend_graph_compute", self.backend, graph.operations)
        return graph.y

    def _build(self, tokens: int, k: int) -> Graph:
        hidden, inter = self.sizes
        nbytes = 4 * tokens * k * (4 * hidden + 4 * inter + 8) + 16 * GRAPH_BYTES
        make = Context(self.ggml, nbytes)
        x, x_data = make.tensor(torch.empty(tokens, 1, hidden, device="meta"))
        ids, ids_data = make.tensor(torch.empty(1, tokens, k, dtype=torch.int32, device="meta"))
        scale, scale_data = make.tensor(torch.empty(tokens, k, 1, device="meta"))
        h = make("ggml_swiglu", make("ggml_mul_mat_id", self.gate_up, x, ids))
        out = make("ggml_mul", make("ggml_mul_mat_id", self.down, h, ids), scale)
        step = [ctypes.c_size_t(4 * hidden * n) for n in range(k + 1)]
        size = ctypes.c_int64(hidden), ctypes.c_int64(tokens)
        parts = [make("ggml_view_2d", out, *size, step[k], step[i]) for i in range(k)]
        y = make("ggml_cont", parts[0])
        for part in parts[1:]:
            y = make("ggml_add", y, part)
        operations = make("ggml_new_graph")
        self.ggml("ggml_build_forward_expand", operations, y)
        y_data = make.data(y, torch.empty(tokens, hidden, device="meta"))
        return Graph(make, operations, x_data, ids_data, scale_data, y_data)
