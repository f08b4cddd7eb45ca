"""Chrome trace, Prometheus text, late and wasted copies."""

import json
import re

import numpy as np
import pytest
import torch

import spac
from spac.attachment import attachment
from spac.budget import bytes_for_ratio
from spac.config import SpacConfig
from spac.control import Snapshot

LENGTH = {"max_length": 128}


def attach(model, ratio, **settings):
    budget = bytes_for_ratio(model, ratio, SpacConfig(**LENGTH | settings))
    return spac.attach(model, budget, **LENGTH | settings)


@pytest.mark.parametrize("static", [False, True])
def test_timeline_holds_every_side(tiny_moe, tmp_path, static):
    model = attach(tiny_moe(), 0.3, static_windows=static, stream_missing=False)
    with spac.timeline(model, tmp_path / "t.json"):
        with pytest.raises(ValueError, match="recorded already"), spac.timeline(model, "x"):
            pass
        spac.generate(model, torch.randint(0, 96, (1, 40)), max_new_tokens=30)
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    spans = [e for e in events if e["ph"] == "X"]
    by_track = {name: [e for e in spans if tracks[e["tid"]] == name] for name in tracks.values()}
    assert len(by_track["windows"]) == 29 and by_track["cpu"] and by_track["link"]
    assert all(e["ts"] >= 0 and e["dur"] >= 0 for e in spans)
    assert {e["name"] for e in by_track["cpu"]} <= {f"layer {i}" for i in range(3)}
    spac.detach(model)
    with pytest.raises(ValueError, match="not attached"), spac.timeline(model, "x"):
        pass


def test_a_recording_may_end_while_the_copy_thread_notes(tiny_moe):
    model, spans, looks = attach(tiny_moe(), 0.3), [], []
    engine = attachment(model).engine

    class Ending(type(engine)):
        @property
        def spans(self):
            looks.append(0)
            return spans if len(looks) == 1 else None

    engine.__class__ = Ending
    engine.note("link", "3 experts", 0.0)
    assert [span[:2] for span in spans] == [("link", "3 experts")]
    engine.close()


def test_prometheus(tiny_moe):
    model = attach(tiny_moe(), 0.3)
    spac.generate(model, torch.randint(0, 96, (1, 40)), max_new_tokens=30)
    text = spac.prometheus(model)
    figures = {}
    for line in text.splitlines():
        if not line.startswith("# TYPE spac_"):
            name, value = re.fullmatch(r'(spac_\w+(?:\{layer="\d+"\})?) (\S+)', line).groups()
            figures[name] = float(value)
    assert figures["spac_windows"] == 29 == figures["spac_generation_target_forwards"]
    assert 0 < figures["spac_coverage"] <= 1
    layers = [figures[f'spac_coverage_by_layer{{layer="{i}"}}'] for i in range(3)]
    assert np.mean(layers) == pytest.approx(figures["spac_coverage"], rel=1e-3)
    spac.detach(model)


def test_late_and_wasted_copies_are_counted(tiny_moe):
    model = attach(tiny_moe(), 0.25)
    engine = attachment(model).engine
    engine.copier.close()
    copier, pool, shape = engine.copier, engine.pool, engine.pool.held.shape
    order = np.zeros(shape)
    engine.control.scores = lambda: order
    frequency = np.zeros(shape, dtype=np.int64)

    def round(window):
        snapshot = Snapshot(window, float(window), np.zeros(shape, np.int32), frequency.copy())
        copier._round(snapshot)
        pool.publish()

    order[:] = pool.held
    late, unused = np.argwhere(~pool.held)[:2]
    order[tuple(late)] = order[tuple(unused)] = 5
    round(1)  # evicts two of the first fill
    round(2)  # copies the two
    assert pool.slot_of[tuple(late)] >= 0 and pool.slot_of[tuple(unused)] >= 0
    assert (copier.late, copier.wasted) == (0, 0)
    frequency[tuple(late)] += 3  # while it was under way
    round(3)
    assert (copier.late, copier.wasted) == (1, 0)
    frequency[tuple(late)] += 3  # in its slot
    order[tuple(late)] = order[tuple(unused)] = -1
    round(4)  # evicts both
    assert (copier.late, copier.wasted) == (1, 1)
    spac.detach(model)
