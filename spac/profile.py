"""What a run learned, for the next one: routing frequencies, utility and the costs of the machine.

A JSON file, so that nothing in it can run; everything in it is checked when it is read.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spac.cost import FORMAT as COSTS
from spac.cost import CostModel
from spac.trace import Trace, load_trace
from spac.utility import MAX_UTILITY

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "spac-profile-1"
_MEMORY = 256  # windows that an older profile counts when a run that began with it is saved
_MOST_PAIRS = 1e9  # of an expert in a window; more is a broken file, and costs would not be finite
_KEYS = {"format", "model", "machine", "windows", "rate", "utility", "costs"}


@dataclass(frozen=True, eq=False)
class Profile:
    """rate float [L, E]: mean pairs of each expert in a window; utility int [L, E] in 0..5;
    windows: how many the rate is a mean of. ValueError names a field that is wrong."""

    rate: NDArray[np.float64]
    utility: NDArray[np.int32]
    windows: int
    costs: CostModel | None  # None: not measured (made from a trace)
    model: str = ""  # class of the model, for messages
    machine: str = ""  # where `costs` was measured: no other machine uses it

    def __post_init__(self) -> None:
        if self.rate.ndim != 2 or self.rate.size == 0 or self.rate.shape != self.utility.shape:
            raise ValueError(
                f"rate, utility: needed one shape [layers, experts], got {self.rate.shape} and "
                f"{self.utility.shape}"
            )
        if not ((self.rate >= 0) & (self.rate <= _MOST_PAIRS)).all():
            raise ValueError(f"rate: needed finite numbers of 0 to {_MOST_PAIRS:g}")
        if self.utility.min() < 0 or self.utility.max() > MAX_UTILITY:
            low, high = self.utility.min(), self.utility.max()
            raise ValueError(f"utility: needed 0..{MAX_UTILITY}, got {low}..{high}")
        if self.windows < 1:
            raise ValueError(f"windows: needed at least 1, got {self.windows}")

    def check_model(self, num_layers: int, num_experts: int) -> None:
        """ValueError unless the profile is of a model with these layers and experts."""
        if self.rate.shape != (num_layers, num_experts):
            layers, experts = self.rate.shape
            raise ValueError(
                f"profile: of {self.model or 'a model'} with {layers} layers x {experts} experts; "
                f"this model has {num_layers} x {num_experts}"
            )

    @staticmethod
    def of_trace(trace: Trace) -> Profile:
        """The frequencies of a routing trace, window by window if it has windows."""
        windows = trace.shape[0] if trace.boundaries is None else len(trace.boundaries) - 1
        counts = trace.counts()
        return Profile(counts / windows, np.zeros(counts.shape, np.int32), windows, None)

    def merged(self, rate: NDArray[np.float64], windows: int) -> NDArray[np.float64]:
        """Mean of this rate and a newer one; this one counts at most 256 windows."""
        mine = min(self.windows, _MEMORY)
        return (mine * self.rate + windows * rate) / (mine + windows)


def machine_name() -> str:
    """The GPU and the number of cores: what measured costs depend on."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{gpu}, {os.cpu_count()} cores"


def save_profile(model: PreTrainedModel, path: str | os.PathLike[str]) -> Profile:
    """Write what the attached `model` has seen since attach (and its profile, if it began with
    one) as JSON; returns it. ValueError if nothing is offloaded or no window has run yet."""
    from spac.attachment import attachment

    state = attachment(model)
    if state is None or state.engine is None:
        raise ValueError("save_profile: needed a model attached with a GPU budget")
    engine = state.engine
    if engine.windows < 1:
        raise ValueError("save_profile: no window has run since attach; generate something first")
    windows, prior = engine.windows, engine.control.prior
    rate = engine.frequency.cpu().numpy() / windows
    if prior is not None:
        rate, windows = prior.merged(rate, windows), min(prior.windows, _MEMORY) + windows
    profile = Profile(
        rate,
        engine.utility.cpu().numpy().clip(0, MAX_UTILITY),
        windows,
        engine.costs,
        type(model).__name__,
        machine_name(),
    )
    data: dict[str, Any] = {"format": FORMAT, "model": profile.model, "machine": profile.machine}
    data |= {"windows": windows, "costs": {"format": COSTS, **asdict(engine.costs)}}
    data |= {"utility": profile.utility.tolist(), "rate": profile.rate.round(4).tolist()}
    with open(path, "w") as f:
        json.dump(data, f)
        f.write("\n")
    return profile


def load_profile(path: str | os.PathLike[str]) -> Profile:
    """Read a file of `save_profile`. Whatever is wrong with it is one line of ValueError that
    names it; a path that does not exist stays a FileNotFoundError."""
    with open(path, "rb") as f:
        text = f.read()
    try:
        data: Any = json.loads(text)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"needed a JSON object with format {FORMAT!r}")
        if set(data) != _KEYS:
            raise ValueError(f"needed the keys {sorted(_KEYS)}, got {sorted(data)}")
        for name, kind in (("model", str), ("machine", str), ("windows", int)):
            if type(data[name]) is not kind:
                raise ValueError(f"{name}: needed {kind.__name__}, got {data[name]!r:.40}")
        return Profile(
            _matrix("rate", data["rate"], (int, float)).astype(np.float64),
            _matrix("utility", data["utility"], (int,)).astype(np.int32),
            data["windows"],
            CostModel.from_dict(data["costs"]),
            data["model"],
            data["machine"],
        )
    except (ValueError, OverflowError, RecursionError) as e:
        raise ValueError(f"{path}: not a profile: {str(e).splitlines()[0]}") from None


def find_profile(
    source: Profile | Trace | str | os.PathLike[str], num_layers: int, num_experts: int, k: int
) -> Profile:
    """The profile of that model in `source`: a profile, a trace, or the file (.npz: a trace)."""
    if isinstance(source, (str, os.PathLike)):
        is_trace = os.fspath(source).endswith(".npz")
        source = load_trace(source) if is_trace else load_profile(source)
    if isinstance(source, Trace):
        source.check_model(num_layers, num_experts, k)
        return Profile.of_trace(source)
    source.check_model(num_layers, num_experts)
    return source


def _matrix(name: str, rows: Any, kinds: tuple[type, ...]) -> NDArray[Any]:
    ok = isinstance(rows, list) and rows and all(isinstance(row, list) for row in rows)
    if not ok or len({len(row) for row in rows}) > 1:
        raise ValueError(f"{name}: needed rows of equal length")
    if any(type(value) not in kinds for row in rows for value in row):
        raise ValueError(f"{name}: needed numbers ({' or '.join(k.__name__ for k in kinds)})")
    return np.array(rows)
