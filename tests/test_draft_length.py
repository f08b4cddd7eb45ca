import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spac.draft_length import DraftLengthController, expected_tokens


class World:
    """A machine and a draft: step seconds per gamma, seconds per drafted token, acceptance."""

    def __init__(self, step, draft, acceptance, seed=0, noise=0.05):
        self.step, self.draft, self.acceptance = step, draft, acceptance
        self.rng, self.noise = np.random.default_rng(seed), noise

    def run(self, control, steps):
        """Returns (tokens, seconds, gammas)."""
        tokens = seconds = 0.0
        gammas = []
        for _ in range(steps):
            gamma = control.choose()
            kept = 0
            while kept < gamma and self.rng.random() < self.acceptance:
                kept += 1
            jitter = self.rng.uniform(1 - self.noise, 1 + self.noise)
            step = self.step(gamma) * jitter
            control.observe(gamma, kept, step, self.draft * gamma)
            tokens, seconds = tokens + kept + 1, seconds + step + self.draft * gamma
            gammas.append(gamma)
        return tokens, seconds, gammas

    def best(self, max_gamma):
        rates = [
            expected_tokens(self.acceptance, g) / (self.step(g) + self.draft * g)
            for g in range(max_gamma + 1)
        ]
        return int(np.argmax(rates)), max(rates)


def memory_bound(gamma):
    return 0.010 + 0.0005 * gamma


def compute_bound(gamma):
    return 0.010 * (gamma + 1)


def saturating(gamma):
    return 0.02 + 0.03 * (1 - 0.8**gamma)


def stepped(gamma):  # a tile boundary after 4 tokens
    return 0.01 if gamma < 4 else 0.025


WORLDS = {
    "cheap draft": (memory_bound, 0.0005, 0.8),
    "costly draft": (memory_bound, 0.006, 0.8),
    "bad draft": (memory_bound, 0.002, 0.15),
    "no overlap": (compute_bound, 0.001, 0.7),
    "saturating": (saturating, 0.002, 0.7),
    "stepped": (stepped, 0.0005, 0.8),
    "certain": (memory_bound, 0.0, 1.0),
    "hopeless": (memory_bound, 0.001, 0.0),
}


@pytest.mark.parametrize("name", WORLDS)
def test_comes_within_five_percent_of_the_best_fixed_gamma(name):
    world = World(*WORLDS[name])
    control = DraftLengthController(8)
    world.run(control, 60)
    tokens, seconds, _ = world.run(control, 3000)
    assert tokens / seconds >= 0.95 * world.best(8)[1]


@pytest.mark.parametrize("name", ["no overlap", "hopeless"])
def test_zero_is_chosen_when_drafting_loses(name):
    world = World(*WORLDS[name])
    control = DraftLengthController(8)
    world.run(control, 100)
    _, _, gammas = world.run(control, 1000)
    assert np.mean(np.array(gammas) == 0) > 0.95
    assert control.reason.startswith("gamma 0:") or "measuring" in control.reason


def test_follows_a_change_of_the_text():
    control = DraftLengthController(8)
    World(memory_bound, 0.002, 0.0).run(control, 400)
    assert control.choose() <= 1
    good = World(memory_bound, 0.002, 0.9)
    good.run(control, 3000)
    tokens, seconds, _ = good.run(control, 500)
    assert tokens / seconds >= 0.9 * good.best(8)[1]


def test_a_cache_that_warms_up_does_not_mislead():
    """Every window gets three times faster over the first 150 steps."""
    control, world = DraftLengthController(8), World(memory_bound, 0.002, 0.8)
    best = world.best(8)[1]
    for step in range(300):
        slow = 1 + 2 * np.exp(-step / 50)
        world.step = lambda g, slow=slow: slow * memory_bound(g)
        world.run(control, 1)
    world.step = memory_bound
    tokens, seconds, _ = world.run(control, 500)
    assert tokens / seconds > 0.93 * best


@pytest.mark.parametrize("draft", [0.001, 0.02])
def test_looks_cost_one_percent_at_most_and_never_end(draft):
    control, world = DraftLengthController(8), World(memory_bound, draft, 0.0, noise=0.0)
    world.run(control, 60)
    tokens, seconds, gammas = world.run(control, 4000)
    assert tokens / seconds >= 0.989 * world.best(8)[1]
    assert 0 < np.mean(np.array(gammas) > 0) < 0.06


def test_deterministic():
    runs = [World(stepped, 0.001, 0.7).run(DraftLengthController(6), 500) for _ in range(2)]
    assert runs[0] == runs[1]


def test_reason_names_the_choice_and_the_alternative():
    control = DraftLengthController(4)
    assert "measuring" in control.reason
    World(memory_bound, 0.0005, 0.8).run(control, 60)
    gamma = control.choose()
    assert f"gamma {gamma}: " in control.reason and "gamma 0 would give" in control.reason
    assert "\n" not in control.reason


def test_a_cost_model_fills_what_was_not_measured():
    control = DraftLengthController(8, predict=lambda g: 2 * stepped(g))
    World(stepped, 0.0, 0.8, noise=0).run(control, 9)  # the opening: 0, 4 and 8
    assert control.seconds(3) < 0.016 and control.seconds(4) == pytest.approx(0.025)


def test_max_gamma_zero_never_drafts():
    control = DraftLengthController(0)
    _, _, gammas = World(memory_bound, 0.0, 1.0).run(control, 100)
    assert set(gammas) == {0}


def test_errors():
    with pytest.raises(ValueError, match="max_gamma: needed at least 0, got -1"):
        DraftLengthController(-1)
    control = DraftLengthController(4)
    with pytest.raises(ValueError, match=r"accepted: needed 0..2, got 3"):
        control.observe(2, 3, 0.1)
    with pytest.raises(ValueError, match="seconds: needed positive finite"):
        control.observe(2, 1, float("nan"))


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1), st.integers(0, 20))
def test_expected_tokens(a, gamma):
    value = expected_tokens(a, gamma)
    assert 1 <= value <= gamma + 1 + 1e-9
    if a < 0.999:
        assert value == pytest.approx((1 - a ** (gamma + 1)) / (1 - a))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.floats(1e-6, 10)), max_size=30))
def test_any_history_gives_a_valid_choice(history):
    control = DraftLengthController(8)
    for gamma, seconds in history:
        control.observe(gamma, gamma // 2, seconds, seconds / 10)
        assert 0 <= control.choose() <= 8 and 0 <= control.acceptance <= 1


def test_steps_that_stall_now_and_then_do_not_end_the_looking():
    control, world = DraftLengthController(8), World(memory_bound, 0.002, 0.7, noise=0.1)
    usual = world.step
    world.step = lambda gamma: usual(gamma) * (4 if world.rng.random() < 0.15 else 1)
    *_, gammas = world.run(control, 3000)
    assert len(set(gammas[1500:])) > 4
    for gamma in (0, 8):  # not only the length in use
        assert 0.7 * usual(gamma) < control.seconds(gamma) - 0.002 * gamma < 2 * usual(gamma)


@pytest.mark.parametrize("most", [1, 3])
def test_a_draft_shorter_than_asked_is_an_answer(most):
    control, world = DraftLengthController(8), World(compute_bound, 0.0, 0.0)
    for _ in range(40):
        gamma = min(control.choose(), most)
        control.observe(gamma, 0, world.step(gamma))
    assert control.choose() == 0  # it never helps


def test_no_draft_at_all_says_nothing_of_drafts():
    control = DraftLengthController(8)
    for _ in range(10):
        assert control.choose() == 4
        control.observe(0, 0, 0.01)
