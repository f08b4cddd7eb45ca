"""What every side did when, as a Chrome trace (chrome://tracing, ui.perfetto.dev)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel

from spac.attachment import attachment

TRACKS = ("windows", "cpu", "link")


@contextmanager
def timeline(model: PreTrainedModel, file: str | os.PathLike[str]) -> Iterator[None]:
    """Record verify windows, the CPU's FFN per layer and copies into slots; write `file` at exit.

        with spac.timeline(model, "trace.json"):
            spac.generate(model, ids)

    Times are those of the host, in microseconds since the start; what the GPU did meanwhile is in
    torch.profiler. Raises ValueError if the model has no slots or is recorded already.
    """
    state = attachment(model)
    engine = None if state is None else state.engine
    if engine is None:
        raise ValueError("timeline: this model is not attached with a GPU budget")
    if engine.spans is not None:
        raise ValueError("timeline: this model is being recorded already")
    spans = engine.spans = []
    try:
        yield
    finally:
        engine.spans = None
        Path(file).write_text(json.dumps({"traceEvents": _events(list(spans))}))


def _events(spans: list[tuple[str, str, float, float]]) -> list[dict]:
    begin = min((start for _, _, start, _ in spans), default=0.0)
    events: list[dict] = [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": i, "args": {"name": track}}
        for i, track in enumerate(TRACKS)
    ]
    for track, name, start, end in spans:
        place = {"pid": 1, "tid": TRACKS.index(track)}
        time = {"ts": (start - begin) * 1e6, "dur": (end - start) * 1e6}
        events.append({"ph": "X", "name": name} | place | time)
    return events
