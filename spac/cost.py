"""Cost model of one machine and one expert shape: seconds, predicted from counts.

Every part is affine in what it works on, so that the balancer can add up experts:

    gpu   = gpu_launch + experts * gpu_expert + pairs * gpu_pair      (resident experts)
    cpu   = cpu_launch + experts * cpu_expert + pairs * cpu_pair      (experts left to the CPU)
    h2d   = copies * h2d_latency + bytes * h2d_byte                   (copies and streamed experts)
    dense = dense_layer + tokens * dense_token                        (the rest of a layer)
    layer = dense + handoff + max(gpu, cpu, streamed bytes * stream_byte)

`*_expert` is the time to read one expert's weights, `*_pair` the arithmetic of one (token, expert)
pair. A launch is paid only by a side that has pairs, the hand-over (splitting the window, the bell,
the answer, the sum) by every layer of a model of which anything is offloaded. Streamed: read by the
kernels from host memory, in the window that needs it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FORMAT = "spac-cost-1"
_LONGEST = 100.0  # seconds; more for one expert, pair or copy is a broken file, not a machine


@dataclass(frozen=True)
class CostModel:
    """Coefficients in seconds (see the module text), for experts of `expert_bytes` bytes."""

    expert_bytes: int
    gpu_launch: float
    gpu_expert: float
    gpu_pair: float
    cpu_launch: float
    cpu_expert: float
    cpu_pair: float
    h2d_latency: float  # per copy
    h2d_byte: float  # 1 / bandwidth
    dense_layer: float = 0.0  # attention, router and norms of one layer, whatever the window
    dense_token: float = 0.0
    handoff: float = 0.0  # of one layer whose window is split between GPU and CPU
    stream_byte: float = 0.0  # 0: as fast as a copy
    name: str = ""  # of the machine, for people

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "name":
                if not isinstance(value, str):
                    raise ValueError(f"name: needed a string, got {value!r}")
            elif f.name == "expert_bytes":
                if type(value) is not int or not 0 < value < 1 << 40:
                    raise ValueError(f"expert_bytes: needed a positive integer, got {value!r}")
            elif type(value) not in (int, float) or not 0 <= value <= _LONGEST:
                raise ValueError(
                    f"{f.name}: needed seconds between 0 and {_LONGEST:g}, got {value!r}"
                )

    def gpu(self, experts: ArrayLike, pairs: ArrayLike) -> NDArray[np.float64]:
        """Seconds of the GPU FFN over `experts` distinct experts and `pairs` pairs."""
        return self._side("gpu", experts, pairs)

    def cpu(self, experts: ArrayLike, pairs: ArrayLike) -> NDArray[np.float64]:
        """Seconds of the CPU FFN over `experts` distinct experts and `pairs` pairs."""
        return self._side("cpu", experts, pairs)

    def h2d(self, copies: ArrayLike) -> NDArray[np.float64]:
        """Seconds to move `copies` experts from the host to the GPU."""
        one = self.h2d_latency + self.expert_bytes * self.h2d_byte
        return np.asarray(copies, dtype=float) * one

    def stream(self, experts: ArrayLike) -> NDArray[np.float64]:
        """Seconds that the kernels take to read `experts` experts from host memory."""
        one = self.expert_bytes * (self.stream_byte or self.h2d_byte)
        return np.asarray(experts, dtype=float) * one

    def missing(self, experts: float, pairs: float) -> float:
        """Seconds of missing experts that CPU and link share as well as whole experts can be
        (`streams`); of a mean number, between those of the numbers below and above it."""
        few, part = int(experts), experts % 1.0
        each = pairs / experts if experts else 0.0
        low, high = self._shared(few + 1, each)[few:].min(axis=1)
        return float((1 - part) * low + part * high)

    def _shared(self, most: int, each: float = 1.0, busy: float = 0.0) -> NDArray[np.float64]:
        """Seconds [most + 1, most + 1] of n missing experts (row) with `each` pairs, of which the
        GPU, when it has been `busy`, reads some (column) and the CPU computes the others."""
        n, streamed = np.ogrid[: most + 1, : most + 1]
        left = np.maximum(n - streamed, 0)
        seconds = np.maximum(self.cpu(left, left * each), busy + self.stream(streamed))
        return np.where(streamed <= n, seconds, np.inf)

    def streams(self, most: int, busy: float = 0.0, within: float = 1.05) -> NDArray[np.int32]:
        """Of n = 0..most missing experts with a pair each, how many the GPU should read from host
        memory while the CPU computes the others, when its resident ones take `busy` seconds: int32
        [most + 1]. The fewest `within` so many times the best: copies need the link as well."""
        seconds = self._shared(most, busy=busy)
        good = seconds <= within * seconds.min(axis=1, keepdims=True)
        return good.argmax(axis=1).astype(np.int32)

    def beside_link(self, most: int) -> CostModel:
        """The model with the CPU's time of missing experts as it is when the link takes its share
        of up to `most` of them."""
        left = 1 - float(self.streams(most)[-1]) / most
        return replace(self, cpu_expert=self.cpu_expert * left, cpu_pair=self.cpu_pair * left)

    def dense(self, tokens: ArrayLike) -> NDArray[np.float64]:
        """Seconds of one layer outside its experts, for a window of `tokens`."""
        return self.dense_layer + np.asarray(tokens, dtype=float) * self.dense_token

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON."""
        with open(path, "w") as f:
            json.dump({"format": FORMAT, **asdict(self)}, f, indent=1)
            f.write("\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> CostModel:
        """Read JSON written by `save` (or by hand). Bad content is one line of ValueError."""
        with open(path, "rb") as f:
            text = f.read()
        try:
            return CostModel.from_dict(json.loads(text))
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}: {str(e).splitlines()[0]}") from None

    @staticmethod
    def from_dict(data: Any) -> CostModel:
        """A model from parsed JSON; unknown, missing and impossible values are ValueErrors."""
        if not isinstance(data, dict):
            raise ValueError(f"needed a JSON object, got {type(data).__name__}")
        data = dict(data)
        if (found := data.pop("format", None)) != FORMAT:
            raise ValueError(f"format: needed {FORMAT!r}, got {found!r}")
        known = {f.name for f in fields(CostModel)}
        required = known - {"dense_layer", "dense_token", "handoff", "stream_byte", "name"}
        if missing := sorted(required - set(data)):
            raise ValueError(f"missing {', '.join(missing)}")
        if unknown := sorted(set(data) - known):
            raise ValueError(f"unknown {', '.join(map(str, unknown))}")
        return CostModel(**data)

    def _side(self, kind: str, experts: ArrayLike, pairs: ArrayLike) -> NDArray[np.float64]:
        launch, expert, pair = (getattr(self, f"{kind}_{n}") for n in ("launch", "expert", "pair"))
        e, p = np.asarray(experts, dtype=float), np.asarray(pairs, dtype=float)
        # An expected count below one expert pays its share of the launch.
        return launch * np.minimum(e, 1.0) + e * expert + p * pair


def fit(rows: ArrayLike, seconds: ArrayLike) -> NDArray[np.float64]:
    """Coefficients c >= 0 that minimise sum(((rows @ c - seconds) / seconds)^2).

    rows [N, F], seconds [N] > 0. Features whose coefficient would be negative are dropped, worst
    first.
    """
    y = np.asarray(seconds, dtype=float)
    a = np.asarray(rows, dtype=float) / y[:, None]
    c, live = np.zeros(a.shape[1]), np.arange(a.shape[1])
    while live.size:
        solution = np.linalg.lstsq(a[:, live], np.ones(len(y)), rcond=None)[0]
        if solution.min() >= 0:
            c[live] = solution
            break
        live = np.delete(live, solution.argmin())
    return c


def measure(layout: Any, device: Any, limit_s: float = 10.0, name: str = "") -> CostModel:
    """Time the real operators on this machine for one `ExpertLayout`; see `spac.measure`."""
    from spac.measure import measure_costs

    return measure_costs(layout, device, limit_s, name)
