"""Profiles that survive a restart: saved, refused when damaged, and a warm start from them."""

import json

import numpy as np
import pytest
import torch

import spac
from spac.attachment import attachment
from spac.budget import bytes_for_ratio
from spac.config import SpacConfig
from spac.policy import POLICIES, make_policy
from spac.profile import Profile, machine_name


def attach(model, ratio=0.3, **settings):
    budget = bytes_for_ratio(model, ratio, SpacConfig(max_length=128))
    return spac.attach(model, budget, max_length=128, **settings)


@pytest.fixture
def saved(tiny_moe, tmp_path):
    model = attach(tiny_moe())
    spac.generate(model, torch.randint(0, 96, (1, 40)), max_new_tokens=24)
    spac.save_profile(model, tmp_path / "p.json")
    frequency = attachment(model).engine.frequency.cpu().numpy()
    spac.detach(model)
    return tmp_path / "p.json", frequency


def test_round_trip_and_warm_start(saved, tiny_moe, tmp_path):
    path, frequency = saved
    profile = spac.load_profile(path)
    assert profile.windows == 23 and profile.machine == machine_name()
    np.testing.assert_allclose(profile.rate * 23, frequency, atol=2e-3)
    model = attach(tiny_moe(), profile=path, policy="static")
    engine = attachment(model).engine
    kept = np.sort(profile.rate[engine.pool.slot_of >= 0])
    assert (kept >= np.sort(profile.rate.ravel())[::-1][len(kept) - 1]).all()
    assert (engine.utility.cpu().numpy() == profile.utility).all()
    assert engine.costs == profile.costs
    ids = torch.randint(0, 96, (1, 7))
    with torch.no_grad():
        got = model(ids.to(model.device)).logits.cpu()
        torch.testing.assert_close(got, tiny_moe()(ids).logits, rtol=1e-4, atol=1e-4)
    # The second profile remembers the first.
    spac.save_profile(model, tmp_path / "q.json")
    assert spac.load_profile(tmp_path / "q.json").windows == 24
    spac.detach(model)


def test_costs_survive_as_they_were_measured(saved, tiny_moe, tmp_path):
    """Not as the balancer has them beside streams: a second profile would halve the CPU's again."""
    path, _ = saved
    data = json.loads(path.read_text())
    data["costs"] |= {"cpu_expert": 2e-4, "h2d_byte": 1e-4 / data["costs"]["expert_bytes"]}
    path.write_text(json.dumps(data))
    model = attach(tiny_moe(), profile=path, stream_missing=True)
    spac.generate(model, torch.randint(0, 96, (1, 9)), max_new_tokens=4)
    spac.save_profile(model, tmp_path / "q.json")
    assert attachment(model).engine.control.costs.cpu_expert < 2e-4
    spac.detach(model)
    assert spac.load_profile(tmp_path / "q.json").costs == spac.load_profile(path).costs


@pytest.mark.parametrize("name", [n for n in POLICIES if n not in ("belady", "oracle")])
def test_every_policy_orders_by_the_profile(name):
    rate = np.random.default_rng(0).permutation(np.arange(24.0)).reshape(2, 12) / 12
    policy = make_policy(name, 2, 12, 8)
    policy.warm_start(rate)
    score = policy.score()
    assert np.isfinite(score).all()
    if name != "lru":  # which knows only that all of them were used
        used = rate > 0
        assert score[rate == rate.max()] == score.max() and score[~used] == score.min()


def test_costs_of_another_machine_are_measured_again(saved, tiny_moe):
    path, _ = saved
    data = json.loads(path.read_text()) | {"machine": "a machine that is not this one"}
    data["costs"]["cpu_launch"] = 99.0
    path.write_text(json.dumps(data))
    model = attach(tiny_moe(), profile=path)
    assert attachment(model).engine.control.costs.cpu_launch < 9
    spac.detach(model)


def test_a_profile_of_another_model_is_refused(saved, tiny_moe):
    model = tiny_moe(num_hidden_layers=2)
    with pytest.raises(ValueError, match="with 3 layers x 16 experts; this model has 2 x 16"):
        attach(model, profile=saved[0])
    assert attachment(model) is None


def test_nothing_to_save(tiny_moe, tmp_path):
    model = tiny_moe()
    with pytest.raises(ValueError, match="attached with a GPU budget"):
        spac.save_profile(model, tmp_path / "p.json")
    attach(model)
    with pytest.raises(ValueError, match="no window has run since attach"):
        spac.save_profile(model, tmp_path / "p.json")
    spac.detach(model)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": "x"}, "needed a JSON object with format 'spac-profile-1'"),
        ({"extra": 1}, "needed the keys"),
        ({"windows": "9"}, "windows: needed int, got '9'"),
        ({"windows": 0}, "windows: needed at least 1"),
        ({"rate": [[1.0], [1.0, 2.0]]}, "rate: needed rows of equal length"),
        ({"rate": [[True]]}, "rate: needed numbers"),
        ({"rate": [[float("nan")] * 16] * 3}, "rate: needed finite numbers"),
        ({"utility": [[9] * 16] * 3}, r"utility: needed 0..5, got 9..9"),
        ({"utility": [[1] * 15] * 3}, r"rate, utility: needed one shape"),
        ({"utility": [[10**30] * 16] * 3}, "not a profile"),
        ({"costs": {}}, "format: needed 'spac-cost-1'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_damage_is_one_line(saved, change, message):
    path, _ = saved
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as caught:
        spac.load_profile(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    "text", [b"", b"\x00\xff", b"[" * 99999, b"[]"], ids=["", "bytes", "[", "[]"]
)
def test_not_json(tmp_path, text):
    (tmp_path / "p.json").write_bytes(text)
    with pytest.raises(ValueError, match="p.json: not a profile: "):
        spac.load_profile(tmp_path / "p.json")


def test_older_windows_fade():
    old = Profile(np.ones((1, 2)), np.zeros((1, 2), dtype=np.int32), 10_000, None)
    np.testing.assert_allclose(old.merged(np.full((1, 2), 3.0), 256), 2.0)
