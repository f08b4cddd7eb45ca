"""How the weights of one MoE layer lie in memory: the contract of every kernel.

`ExpertLayout` describes the experts of a layer; `ExpertTable` tells a kernel where each expert is.
A table entry may point at a slot of the GPU pool, at a plain parameter tensor, or at pinned host
memory: the kernels do not care (DESIGN section 4, "Expert address table").
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "swiglu_clamp")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMS = ("float", "int8", "int4")
GROUPS = (32, 128)  # weights along K that share a scale of int4
_SECTION_ALIGN = 16  # bytes; every section of a blob can be read with 16-byte loads
_BLOB_ALIGN = 256  # bytes


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


@dataclass(frozen=True)
class ExpertLayout:
    """Shape, dtype and storage order of the experts of one layer.

    The FFN is `down @ (act(gate @ x) * up @ x)`; "swiglu_clamp" is GPT-OSS's
    `(clamp(up, -limit, limit) + 1) * g * sigmoid(alpha * g)` with `g = min(gate, limit)`.
    """

    num_experts: int  # E
    hidden: int  # H
    intermediate: int  # I
    dtype: torch.dtype
    activation: str = "silu"
    alpha: float = 0.0
    limit: float = 0.0
    transposed: bool = False  # parameters are gate_up [E, H, 2I], down [E, I, H]
    interleaved: bool = False  # gate and up rows alternate instead of lying in two halves
    bias: bool = False  # gate_up_bias [E, 2I], down_bias [E, H]
    # How the weights are stored: "float" (in `dtype`), or quantised as `spac.quantize` says; then
    # `dtype` is that of activations and biases.
    form: str = "float"
    group: int = 0  # of int4

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {self.activation!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected bfloat16, float16 or float32, got {self.dtype}")
        if min(self.num_experts, self.hidden, self.intermediate) < 1:
            raise ValueError("num_experts, hidden and intermediate must be at least 1")
        if self.form not in FORMS:
            raise ValueError(f"form: expected one of {FORMS}, got {self.form!r}")
        if self.form != "float" and self.transposed:
            raise ValueError(f"form {self.form}: rows are contiguous, transposed must be False")
        if self.form != "int4":
            if self.group:
                raise ValueError(f"group: only for form int4, got {self.group} for {self.form}")
            return
        if self.group not in GROUPS:
            raise ValueError(f"group: expected one of {GROUPS} for form int4, got {self.group}")
        if self.hidden % self.group or self.intermediate % self.group:
            raise ValueError(
                f"form int4: hidden and intermediate must be multiples of group {self.group}, "
                f"got {self.hidden} and {self.intermediate}"
            )

    @staticmethod
    def of_parameters(
        gate_up: Tensor,
        bias: bool,
        activation: str,
        alpha: float,
        limit: float,
        transposed: bool,
        interleaved: bool,
    ) -> ExpertLayout:
        """Of stacked parameters: gate_up [E, 2I, H], or [E, H, 2I] if `transposed`."""
        E, a, b = gate_up.shape
        hidden, two_i = (a, b) if transposed else (b, a)
        if two_i % 2:
            raise ValueError(
                f"gate_up: expected as many gate as up rows, got {two_i} in {list(gate_up.shape)}"
            )
        return ExpertLayout(
            num_experts=E,
            hidden=hidden,
            intermediate=two_i // 2,
            dtype=gate_up.dtype,
            activation=activation,
            alpha=alpha,
            limit=limit,
            transposed=transposed,
            interleaved=interleaved,
            bias=bias,
        )

    def quantized(self, form: str, group: int = 0) -> ExpertLayout:
        """The same experts with weights of `form`; int4 in groups of `group` (default 32)."""
        if form == "int4":
            group = group or GROUPS[0]
        return replace(self, form=form, group=group, transposed=False)

    def row_units(self, k: int) -> int:
        """Storage elements of a row of `k` weights: numbers, or bytes of two for int4."""
        return k // 2 if self.form == "int4" else k

    def row_scales(self, k: int) -> int:
        """Scales of a row of `k` weights."""
        return k // self.group if self.form == "int4" else 1

    def section_dtype(self, name: str) -> torch.dtype:
        """Storage dtype of a section."""
        if self.form == "float" or name.endswith("bias"):
            return self.dtype
        if name.endswith("scale"):
            return torch.float32 if self.form == "int8" else torch.float16
        return torch.int8 if self.form == "int8" else torch.uint8

    def sections(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Byte offset and shape of each weight inside one expert's blob (row-major)."""
        H, inter = self.hidden, self.intermediate
        shapes: dict[str, tuple[int, ...]] = {
            "gate_up": (2 * inter, self.row_units(H)),
            "down": (H, self.row_units(inter)),
        }
        if self.bias:
            shapes["gate_up_bias"] = (2 * inter,)
            shapes["down_bias"] = (H,)
        if self.form != "float":
            shapes["gate_up_scale"] = (2 * inter, self.row_scales(H))
            shapes["down_scale"] = (H, self.row_scales(inter))
        out, offset = {}, 0
        for name, shape in shapes.items():
            out[name] = (offset, shape)
            offset = _round_up(offset + self._section_bytes(name, shape), _SECTION_ALIGN)
        return out

    def _section_bytes(self, name: str, shape: tuple[int, ...]) -> int:
        return self.section_dtype(name).itemsize * math.prod(shape)

    @property
    def blob_bytes(self) -> int:
        """Bytes of one expert in the host store and in a slot."""
        name, (offset, shape) = list(self.sections().items())[-1]
        return _round_up(offset + self._section_bytes(name, shape), _BLOB_ALIGN)


@dataclass(frozen=True)
class Slots:
    """All that `address` can point at: an entry is 0 or where gate_up[i] begins, for some i.

    gate_up [n, 2I, H] and down [n, H, I] or both transposed, on the device of the kernels. It
    says nothing about a table whose `address` is another tensor.
    """

    address: Tensor
    gate_up: Tensor
    down: Tensor

    @property
    def span(self) -> tuple[int, int]:
        """Address of slot 0 and bytes from one slot to the next."""
        return self.gate_up.data_ptr(), self.gate_up.stride(0) * self.gate_up.element_size()

    @staticmethod
    def from_blobs(layout: ExpertLayout, address: Tensor, memory: Tensor) -> Slots | None:
        """The sections of the blobs in `memory` uint8 [n, bytes]; None if they are quantised."""
        if layout.form != "float":
            return None
        flat, views = memory.view(layout.dtype), []
        for name in ("gate_up", "down"):
            offset, (rows, columns) = layout.sections()[name]
            start = flat.storage_offset() + offset // layout.dtype.itemsize
            shape = (memory.shape[0], rows, columns)
            views.append(flat.as_strided(shape, (flat.stride(0), columns, 1), start))
        return Slots(address, *views)


@dataclass(frozen=True)
class Places:
    """Room for A experts of one layer at a time.

    memory uint8 [A, bytes], of the places' own; source and target int64 [A], addresses of each
    place's expert in host memory (0: none) and of where it goes; of int32 [E], the place of each
    expert (-1: none); flags and arrived int32 [A]; failed int32 [1] in host memory, 1 if an expert
    did not come in time. Of the layer: value float32 [E] of its experts, and exchanged int32
    [A, 2], which expert took whose slot in the last window (-1: none); `reference.split_window`.
    """

    memory: Tensor
    source: Tensor
    target: Tensor
    of: Tensor
    flags: Tensor
    arrived: Tensor
    failed: Tensor
    value: Tensor
    exchanged: Tensor

    @staticmethod
    def over(memory: Tensor, value: Tensor, exchanged: Tensor) -> list[Places]:
        """For every layer of value [L, E] and exchanged [L, A, 2], with all else in common."""
        device, n = memory.device, len(memory)

        def zeros(dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(n, dtype=dtype, device=device)

        of = torch.full((value.shape[1],), -1, dtype=torch.int32, device=device)
        failed = torch.zeros(1, dtype=torch.int32, pin_memory=memory.is_cuda)
        addresses = zeros(torch.int64), zeros(torch.int64)
        common = memory, *addresses, of, zeros(), zeros(), failed
        return [Places(*common, *layer) for layer in zip(value, exchanged, strict=True)]


@dataclass(frozen=True)
class ExpertTable:
    """Where the experts of one layer are, and how to walk through one of them.

    The gate row j of expert e starts at `address[e]` bytes plus `j * gate_stride` elements, its up
    row `up_offset` elements further, its down row n at
    `address[e] + down_offset + e * down_skew` bytes plus `n * down_stride` elements; biases
    likewise. Of quantised weights, strides and `up_offset` count storage elements (bytes); the
    scales of stored row n of gate_up or down begin at `address[e]` plus their offset in bytes
    plus `n * layout.row_scales(K)` scales. `address[e] == 0` means that the expert is not here:
    its pairs give zero.
    """

    layout: ExpertLayout
    address: Tensor  # int64 [E], on the device of the kernel that reads it
    gate_stride: int
    gate_k_stride: int
    up_offset: int
    down_offset: int  # bytes
    down_skew: int  # bytes per expert
    down_stride: int
    down_k_stride: int
    gate_up_bias_offset: int = 0  # bytes; the biases are read only if layout.bias
    gate_up_bias_skew: int = 0
    down_bias_offset: int = 0
    down_bias_skew: int = 0
    bias_stride: int = 1  # elements between the biases of gate row j and j + 1
    bias_up_offset: int = 0  # elements from the bias of gate row j to that of up row j
    gate_up_scale_offset: int = 0  # bytes; the scales are there only if layout.form is not "float"
    down_scale_offset: int = 0
    align: int = _SECTION_ALIGN  # bytes, a power of two that divides every address
    copy_to: Tensor | None = None  # int64 [E]: where to store an expert's blob that is read; 0: no
    owner: object = None  # keeps the memory behind the addresses alive
    places: Places | None = None  # experts that are on their way there: kernels wait for them
    slots: Slots | None = None

    @staticmethod
    def from_blobs(
        layout: ExpertLayout, address: Tensor, owner: object = None, memory: Tensor | None = None
    ) -> ExpertTable:
        """Table over row-major blobs (host store or slots) that start at `address[e]`.

        memory: uint8 [n, bytes], if every address that is not 0 is that of one of its rows.
        """
        H, inter = layout.row_units(layout.hidden), layout.intermediate
        sections = layout.sections()
        others = ("gate_up_bias", "down_bias", "gate_up_scale", "down_scale")
        offsets: dict[str, Any] = {
            f"{name}_offset": sections[name][0] for name in others if name in sections
        }
        return ExpertTable(
            layout=layout,
            address=address,
            gate_stride=2 * H if layout.interleaved else H,
            gate_k_stride=1,
            up_offset=H if layout.interleaved else inter * H,
            down_offset=sections["down"][0],
            down_skew=0,
            down_stride=layout.row_units(inter),
            down_k_stride=1,
            bias_stride=2 if layout.interleaved else 1,
            bias_up_offset=1 if layout.interleaved else inter,
            owner=owner if memory is None else memory,
            slots=None if memory is None else Slots.from_blobs(layout, address, memory),
            **offsets,
        )

    @staticmethod
    def from_parameters(
        layout: ExpertLayout,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> ExpertTable:
        """Table over stacked parameter tensors, [E, 2I, H] and [E, H, I] or both transposed."""
        if layout.form != "float":
            raise ValueError(f"table: {layout.form} weights lie in blobs; use from_blobs")
        row, col = (2, 1) if layout.transposed else (1, 2)
        size = layout.dtype.itemsize
        base, skew = gate_up.data_ptr(), gate_up.stride(0) * size
        end = base + skew * layout.num_experts
        bias: dict[str, Any] = {}
        if gate_up_bias is not None and down_bias is not None:
            if gate_up_bias.stride(1) != 1 or down_bias.stride(1) != 1:
                raise ValueError(
                    "biases: expected rows of stride 1, "
                    f"got strides {gate_up_bias.stride()} and {down_bias.stride()}"
                )
            bias = {
                "gate_up_bias_offset": gate_up_bias.data_ptr() - base,
                "gate_up_bias_skew": gate_up_bias.stride(0) * size - skew,
                "down_bias_offset": down_bias.data_ptr() - base,
                "down_bias_skew": down_bias.stride(0) * size - skew,
            }
        step = gate_up.stride(row)
        if skew:
            address = torch.arange(base, end, skew, device=gate_up.device)
        else:  # an expanded tensor: all experts are one
            address = torch.full((layout.num_experts,), base, device=gate_up.device)
        return ExpertTable(
            layout=layout,
            address=address,
            gate_stride=2 * step if layout.interleaved else step,
            gate_k_stride=gate_up.stride(col),
            up_offset=step if layout.interleaved else layout.intermediate * step,
            down_offset=down.data_ptr() - base,
            down_skew=down.stride(0) * size - skew,
            down_stride=down.stride(row),
            down_k_stride=down.stride(col),
            bias_stride=2 if layout.interleaved else 1,
            bias_up_offset=1 if layout.interleaved else layout.intermediate,
            align=math.gcd(base, skew, _SECTION_ALIGN),
            owner=(gate_up, down, gate_up_bias, down_bias),
            slots=Slots(address, gate_up, down) if skew and down.stride(0) else None,
            **bias,
        )

    def for_cpu(self) -> tuple:
        """As the C++ operators take it; ValueError where they cannot read it."""
        if self.gate_k_stride != 1 or self.down_k_stride != 1:
            raise ValueError(
                "table: the CPU kernels need row-major weights (k stride 1); "
                "transposed parameters given"
            )
        layout = self.layout
        rows = [self.gate_stride, self.up_offset]
        rows += [self.down_offset, self.down_skew, self.down_stride]
        biases = [self.gate_up_bias_offset, self.gate_up_bias_skew]
        biases += [self.down_bias_offset, self.down_bias_skew]
        biases += [self.bias_stride, self.bias_up_offset]
        activation = (layout.activation, layout.alpha, layout.limit)
        scales = (layout.form, layout.group, self.gate_up_scale_offset, self.down_scale_offset)
        head = (self.address, layout.dtype, layout.intermediate, *rows, layout.bias)
        return (*head, *biases, *activation, *scales)
