from pathlib import Path

import numpy as np
import pytest

from spac.trace import Trace, load_trace, save_trace

REAL = Path(__file__).resolve().parents[2] / "shared" / "traces"
REAL_SHAPES = {
    "qwen3-30b-a3b": ((128, 48, 6), 128),
    "gemma-4-26b-a4b": ((128, 30, 6), 128),
    "gpt-oss-120b": ((64, 36, 2), 128),
    "gpt-oss-20b-gpqa": ((511, 24, 4), 32),
    "gpt-oss-20b-mmlu": ((511, 24, 4), 32),
}
IDS = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)


def full_trace() -> Trace:
    return Trace(
        IDS.astype(np.int16),
        24,
        boundaries=np.array([0, 3, 4]),
        accepted=np.array([2, 0]),
        model="some/model",
    )


@pytest.mark.parametrize("trace", [Trace(IDS, 24), full_trace()], ids=["plain", "full"])
def test_round_trip(tmp_path, trace):
    path = tmp_path / "trace.bin"
    save_trace(path, trace)
    back = load_trace(path)
    assert back.num_experts == 24 and back.model == trace.model
    assert back.expert_ids.dtype == trace.expert_ids.dtype
    for name in ("expert_ids", "boundaries", "accepted"):
        np.testing.assert_array_equal(getattr(back, name), getattr(trace, name))


def test_windows():
    trace = full_trace()
    assert [len(w) for w in trace.windows()] == [3, 1]  # as recorded
    assert [len(w) for w in trace.windows(3)] == [3, 1]
    assert [len(w) for w in trace.windows(2)] == [2, 2]
    assert [len(w) for w in trace.windows(9)] == [4]
    assert [len(w) for w in Trace(IDS, 24).windows()] == [1] * 4
    np.testing.assert_array_equal(np.concatenate(list(trace.windows(3))), IDS)
    with pytest.raises(ValueError, match="size: needed at least 1"):
        next(trace.windows(0))


def test_a_trace_of_another_model_is_refused():
    trace = full_trace()
    trace.check_model(3, 24, 2)
    with pytest.raises(
        ValueError,
        match="trace of some/model has 3 layers x 24 experts, top-2; the model has 48 x 128, top-8",
    ):
        trace.check_model(48, 128, 8)


B = np.array
BAD_FIELDS = {
    "float": ({"expert_ids": np.full((4, 3, 2), np.nan)}, "expert_ids: needed uint8 or int16"),
    "int64": ({"expert_ids": IDS.astype(np.int64)}, "got int64"),
    "2d": ({"expert_ids": IDS[0]}, "3 dimensions"),
    "empty": ({"expert_ids": IDS[:0]}, "at least one id"),
    "high": ({"num_experts": B(23)}, "expert_ids: needed ids in 0..22, got 0..23"),
    "negative": ({"expert_ids": -IDS.astype(np.int16)}, "got -23..0"),
    "no experts": ({"num_experts": B(0)}, "num_experts: needed at least 1, got 0"),
    "experts": ({"num_experts": B(24.0)}, "num_experts: needed one integer, got float64"),
    "model": ({"model": B(3)}, "model: needed one string"),
    "unknown": ({"probs": B(3)}, r"unknown arrays \['probs'\]"),
    "edges": ({"boundaries": B([0, 2])}, "boundaries: needed increasing offsets from 0 to 4"),
    "order": ({"boundaries": B([0, 3, 3, 4])}, "boundaries: needed increasing"),
    "orphan": ({"accepted": B([0])}, "accepted: needs boundaries"),
    "windows": ({"boundaries": B([0, 2, 4]), "accepted": B([0])}, "needed 2 windows, got 1"),
    "too many": ({"boundaries": B([0, 2, 4]), "accepted": B([0, 2])}, "accepted: needed 0..W-1"),
    "pickle": ({"expert_ids": B([{}], dtype=object)}, "not a readable trace"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_bad_content_is_one_line_that_names_the_file(tmp_path, case):
    fields, message = BAD_FIELDS[case]
    path = tmp_path / "bad.npz"
    np.savez(path, **({"expert_ids": IDS, "num_experts": B(24)} | fields))
    with pytest.raises(ValueError, match=message) as e:
        load_trace(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_a_missing_array_and_a_missing_file(tmp_path):
    path = tmp_path / "bad.npz"
    np.savez(path, expert_ids=IDS)
    with pytest.raises(ValueError, match="needed an array 'num_experts', got"):
        load_trace(path)
    with pytest.raises(FileNotFoundError):
        load_trace(tmp_path / "none.npz")


def test_damaged_files_are_value_errors(tmp_path):
    path = tmp_path / "trace.npz"
    save_trace(path, full_trace())
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [good[:n] for n in (0, 3, len(good) // 2, len(good) - 1)] + [b"not a trace"]
    for _ in range(100):
        flipped = bytearray(good)
        flipped[rng.integers(len(good))] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    refused = 0
    for data in damaged:
        path.write_bytes(data)
        try:
            load_trace(path)  # a flip in an unused header field can be harmless
        except ValueError as e:
            refused += 1
            assert str(path) in str(e) and "\n" not in str(e)
    assert refused > len(damaged) // 2
    np.save(tmp_path / "one.npy", IDS)
    with pytest.raises(ValueError, match="needed an npz archive"):
        load_trace(tmp_path / "one.npy")


@pytest.mark.skipif(not REAL.is_dir(), reason="the development traces are not here")
@pytest.mark.parametrize("name", REAL_SHAPES)
def test_real_traces(name):
    shape, experts = REAL_SHAPES[name]
    trace = load_trace(REAL / f"{name}.npz")
    assert trace.shape == shape
    trace.check_model(shape[1], experts, shape[2])


def test_text_leaves_rejected_rows_out():
    ids = np.random.default_rng().integers(0, 9, (7, 2, 3)).astype(np.uint8)
    trace = Trace(ids, 9, np.array([0, 3, 4, 7]), np.array([1, 0, 2]), "m")
    text = trace.text()
    np.testing.assert_array_equal(text.expert_ids, ids[[0, 1, 3, 4, 5, 6]])
    assert (text.num_experts, text.boundaries, text.accepted, text.model) == (9, None, None, "m")
    plain = Trace(ids, 9, np.array([0, 3, 7]))
    assert plain.text() is plain
