import dataclasses
import json
import time

import numpy as np
import pytest

from spac.cost import FORMAT, CostModel, fit, measure

MODEL = CostModel(
    expert_bytes=9_437_184,
    gpu_launch=30e-6,
    gpu_expert=2.4e-6,
    gpu_pair=0.02e-6,
    cpu_launch=20e-6,
    cpu_expert=95e-6,
    cpu_pair=6e-6,
    h2d_latency=8e-6,
    h2d_byte=1 / 55e9,
    dense_layer=60e-6,
    dense_token=1e-6,
    name="H200 host",
)


def test_a_side_without_pairs_costs_nothing():
    for side in (MODEL.gpu, MODEL.cpu):
        nothing, one = side([0, 1], [0, 1])
        assert nothing == 0 and one > 0
    assert MODEL.gpu(10, 40) == pytest.approx(30e-6 + 24e-6 + 0.8e-6)
    assert MODEL.cpu(3, 5) == pytest.approx(20e-6 + 285e-6 + 30e-6)
    assert MODEL.h2d(2) == pytest.approx(2 * (8e-6 + 9_437_184 / 55e9))


def test_save_load(tmp_path):
    MODEL.save(tmp_path / "c.json")
    assert CostModel.load(tmp_path / "c.json") == MODEL


BAD = {
    "missing": ({"gpu_pair": None}, "missing gpu_pair"),
    "unknown": ({"speed": 3}, "unknown speed"),
    "string": ({"cpu_pair": "fast"}, "cpu_pair: needed seconds between 0 and 100, got 'fast'"),
    "bool": ({"cpu_pair": True}, "cpu_pair: needed seconds"),
    "negative": ({"h2d_byte": -1e-9}, "h2d_byte: needed seconds"),
    "nan": ({"gpu_expert": float("nan")}, "gpu_expert: needed seconds .* got nan"),
    "inf": ({"gpu_expert": float("inf")}, "got inf"),
    "huge": ({"dense_layer": 1e9}, "dense_layer: needed seconds"),
    "bytes": ({"expert_bytes": 1.5}, "expert_bytes: needed a positive integer, got 1.5"),
    "no bytes": ({"expert_bytes": 0}, "expert_bytes: needed a positive integer"),
    "name": ({"name": 7}, "name: needed a string"),
    "format": ({"format": "x"}, f"format: needed '{FORMAT}', got 'x'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_json_is_one_line_that_names_file_and_field(tmp_path, case):
    change, message = BAD[case]
    path = tmp_path / "c.json"
    MODEL.save(path)
    data = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
    with pytest.raises(ValueError, match=message) as e:
        CostModel.load(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"\xff\xfe", b"3", b"[" * 100_000], ids=range(6)
)
def test_what_is_not_a_json_object(tmp_path, text):
    path = tmp_path / "c.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match="c.json: ") as e:
        CostModel.load(path)
    assert "\n" not in str(e.value)


def test_fit_recovers_and_never_goes_negative():
    rows = [(1, e, p) for e in (1, 4, 16) for p in (e, 4 * e)]
    np.testing.assert_allclose(fit(rows, np.array(rows) @ [1e-5, 2e-6, 3e-7]), [1e-5, 2e-6, 3e-7])
    c = fit(rows, [1e-5 + 1e-6 * e - 1e-8 * p for _, e, p in rows])
    assert (c >= 0).all() and c[2] == 0


def test_measure_on_this_machine(device):
    torch = pytest.importorskip("torch")
    pytest.importorskip("spac.ops")
    from spac.layout import ExpertLayout

    layout = ExpertLayout(num_experts=16, hidden=256, intermediate=128, dtype=torch.float32)
    if device == "cpu" and not hasattr(torch.ops.spac, "expert_ffn_cpu"):
        pytest.importorskip("spac._C")
        if not hasattr(torch.ops.spac, "expert_ffn_cpu"):
            pytest.skip("the C++ extension is not built")
    start = time.perf_counter()
    m = measure(layout, device, limit_s=1.0)
    assert time.perf_counter() - start < 30
    assert m.expert_bytes == layout.blob_bytes
    assert m.cpu(16, 16) > m.cpu(1, 1) > 0
    assert m.h2d(1) > 0 and m.gpu(16, 16) > 0


def test_missing_is_what_cpu_and_link_take_together():
    costs = CostModel(100, 0, 1, 0, 0, 3.0, 0.5, 0, 0.02, stream_byte=0.04)
    assert costs.stream(2) == pytest.approx(8)
    assert dataclasses.replace(costs, stream_byte=0.0).stream(2) == pytest.approx(4)  # as a copy
    assert costs.missing(0, 0) == 0
    assert costs.missing(1, 1) == pytest.approx(3.5)  # by the CPU
    assert costs.missing(2, 2) == pytest.approx(4.0)  # one each
    assert costs.missing(5, 5) == pytest.approx(10.5)  # two on the link
    assert costs.missing(1.25, 1.25) == pytest.approx(0.75 * 3.5 + 0.25 * 4.0)
    assert costs.missing(2, 6) == pytest.approx(4.5)


def test_streams_lets_both_sides_end_together():
    costs = dataclasses.replace(
        MODEL, cpu_launch=1e-4, cpu_expert=1e-4, h2d_byte=2e-4 / 1000, expert_bytes=1000
    )
    streams = costs.streams(40)
    assert streams[0] == 0 and (np.diff(streams) >= 0).all()
    for n in (1, 7, 40):
        times = [max(float(costs.cpu(n - s, n - s)), s * 2e-4) for s in range(n + 1)]
        assert times[streams[n]] <= 1.05 * min(times) < min([*times[: streams[n]], 1.0])
    shared = costs.beside_link(40)
    assert shared.cpu_expert == pytest.approx(costs.cpu_expert * (1 - streams[40] / 40))
