"""Machines as a few bandwidths and rates, from which the cost model of any expert shape follows.

A machine is a profile for prediction when nothing was measured; `spac.cost.measure` is better.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from typing import Any

from spac.cost import CostModel

FORMAT = "spac-machine-1"
_OPTIONAL = {"handoff", "stream_bandwidth", "source"}


@dataclass(frozen=True)
class Machine:
    """Sustained figures of one machine; `source` says which are measured and which assumed."""

    name: str
    gpu_bandwidth: float  # bytes/s of expert weights read by the grouped kernel
    gpu_flops: float  # flop/s of that kernel
    gpu_launch: float  # seconds of one expert FFN without work
    cpu_bandwidth: float  # bytes/s of expert weights read by the CPU kernel
    cpu_flops: float
    cpu_launch: float  # seconds to hand rows to the CPU and back
    h2d_bandwidth: float  # bytes/s, host to GPU
    h2d_latency: float  # seconds per copy
    dense_layer: float  # seconds of one layer outside its experts
    dense_token: float
    draft_token: float  # seconds per drafted token
    handoff: float = 0.0  # seconds of a layer whose window is split between GPU and CPU
    stream_bandwidth: float = 0.0  # bytes/s of kernels that read host memory; 0: as a copy
    source: str = ""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("name", "source"):
                if not isinstance(value, str):
                    raise ValueError(f"{f.name}: needed a string, got {value!r}")
                continue
            rate = f.name.endswith(("bandwidth", "flops"))
            low, high = (1.0, 1e18) if rate else (0.0, 100.0)
            if f.name == "stream_bandwidth" and value == 0:
                continue
            if type(value) not in (int, float) or not low <= value <= high:
                raise ValueError(f"{f.name}: needed a number in {low:g}..{high:g}, got {value!r}")

    def cost(self, expert_bytes: int, expert_flops: float) -> CostModel:
        """Cost model for experts of these bytes and flops per pair (6 H I for a gated FFN)."""
        return CostModel(
            expert_bytes=expert_bytes,
            gpu_launch=self.gpu_launch,
            gpu_expert=expert_bytes / self.gpu_bandwidth,
            gpu_pair=expert_flops / self.gpu_flops,
            cpu_launch=self.cpu_launch,
            cpu_expert=expert_bytes / self.cpu_bandwidth,
            cpu_pair=expert_flops / self.cpu_flops,
            h2d_latency=self.h2d_latency,
            h2d_byte=1 / self.h2d_bandwidth,
            dense_layer=self.dense_layer,
            dense_token=self.dense_token,
            handoff=self.handoff,
            stream_byte=1 / self.stream_bandwidth if self.stream_bandwidth else 0.0,
            name=self.name,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON."""
        with open(path, "w") as f:
            json.dump({"format": FORMAT, **asdict(self)}, f, indent=1)
            f.write("\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Machine:
        """Read JSON written by `save` or by hand. Bad content is one line of ValueError."""
        with open(path, "rb") as f:
            text = f.read()
        try:
            data: Any = json.loads(text)
            if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
                raise ValueError(f"needed a JSON object with format {FORMAT!r}")
            known = {f.name for f in fields(Machine)}
            if missing := sorted(known - _OPTIONAL - set(data)):
                raise ValueError(f"missing {', '.join(missing)}")
            if unknown := sorted(set(data) - known):
                raise ValueError(f"unknown {', '.join(unknown)}")
            return Machine(**data)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}: {str(e).splitlines()[0]}") from None


MACHINES = {
    "h200": Machine(
        name="h200",
        gpu_bandwidth=4.29e12,
        gpu_flops=6e13,
        gpu_launch=10e-6,
        cpu_bandwidth=118e9,
        cpu_flops=1e13,
        cpu_launch=9e-6,
        h2d_bandwidth=56e9,
        h2d_latency=6.5e-6,
        dense_layer=29e-6,
        dense_token=0.8e-6,
        draft_token=0.93e-3,
        handoff=33e-6,
        stream_bandwidth=48e9,
        source="measured, Qwen3-30B in bf16: copies, the GPU's and the CPU's FFN and streams as the"
        " engine learnt them beside each other, dense part of a layer, a step of a draft of 0.6 B;"
        " fitted to decode steps: hand-over",
    ),
    "rtx4090": Machine(
        name="rtx4090",
        gpu_bandwidth=0.85e12,
        gpu_flops=0.8e14,
        gpu_launch=40e-6,
        cpu_bandwidth=65e9,
        cpu_flops=0.8e12,
        cpu_launch=20e-6,
        h2d_bandwidth=25e9,
        h2d_latency=8e-6,
        dense_layer=100e-6,
        dense_token=1e-6,
        draft_token=6e-3,
        source="assumed: RTX 4090 (1 TB/s), PCIe 4 x16, dual-channel DDR5-5600, 16 AVX2 cores",
    ),
    "laptop": Machine(
        name="laptop",
        gpu_bandwidth=0.22e12,
        gpu_flops=0.3e14,
        gpu_launch=50e-6,
        cpu_bandwidth=50e9,
        cpu_flops=0.4e12,
        cpu_launch=25e-6,
        h2d_bandwidth=12e9,
        h2d_latency=10e-6,
        dense_layer=250e-6,
        dense_token=3e-6,
        draft_token=12e-3,
        source="assumed: laptop GPU with 256 GB/s, PCIe 4 x8, dual-channel DDR5-5600, 8 AVX2 cores",
    ),
}


def find_machine(name: str) -> Machine:
    """A machine of `MACHINES`, or one read from a JSON file."""
    if name in MACHINES:
        return MACHINES[name]
    if os.path.exists(name):
        return Machine.load(name)
    raise ValueError(f"profile: expected one of {', '.join(MACHINES)} or a JSON file, got {name!r}")
