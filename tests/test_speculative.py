"""spac.generate: greedy text is the plain model's own, whatever budget, draft and draft length."""

import itertools
import random

import pytest
import torch

import spac
from spac.budget import bytes_for_ratio
from spac.config import POLICIES, SpacConfig
from spac.draft import ModelDraft, NgramDraft
from spac.record import Recorder

PROMPT = torch.randint(0, 96, (1, 23), generator=torch.Generator().manual_seed(1))
NEW = 40


@pytest.fixture(scope="module")
def expected(request):
    return {}


def plain_text(tiny_moe, expected) -> torch.Tensor:
    if not expected:
        model = tiny_moe()
        expected["text"] = model.generate(PROMPT, max_new_tokens=NEW, do_sample=False)
    return expected["text"]


def draft_model(name, tiny_moe, model):
    if name == "other":  # agrees with the target now and then
        return tiny_moe(seed=0, num_hidden_layers=1)
    return model if name == "itself" else name


@pytest.mark.parametrize("draft_name", [None, "ngram", "other", "itself"])
@pytest.mark.parametrize("ratio", [None, 0.0, 0.3])
def test_greedy_equals_plain_generation(tiny_moe, expected, ratio, draft_name):
    text = plain_text(tiny_moe, expected)
    model = tiny_moe()
    draft = draft_model(draft_name, tiny_moe, model)
    if ratio is not None:
        settings = SpacConfig(max_length=128)
        helper = draft if draft_name == "other" else None
        budget = bytes_for_ratio(model, ratio, settings, helper)
        spac.attach(model, budget, draft=helper, max_length=128)
    elif draft_name == "other":
        draft.to(model.device)
    for gamma in (0, 1, 4, "auto"):
        out = spac.generate(model, PROMPT, draft=draft, num_draft_tokens=gamma, max_new_tokens=NEW)
        assert torch.equal(out.cpu(), text), (ratio, draft_name, gamma)


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_and_rejected_weight_do_not_change_text(tiny_moe, expected, policy):
    text = plain_text(tiny_moe, expected)
    model = tiny_moe()
    settings = {"max_length": 128, "policy": policy, "rejected_weight": 0.25, "rebalance_every": 4}
    spac.attach(model, bytes_for_ratio(model, 0.3, SpacConfig(**settings)), **settings)
    out = spac.generate(model, PROMPT, draft="ngram", num_draft_tokens=4, max_new_tokens=NEW)
    assert torch.equal(out.cpu(), text)


def test_plain_generate_with_an_assistant(tiny_moe, expected):
    text = plain_text(tiny_moe, expected)
    model, assistant = tiny_moe(), tiny_moe(num_hidden_layers=1)
    budget = bytes_for_ratio(model, 0.3, SpacConfig(max_length=128), assistant)
    spac.attach(model, budget, draft=assistant, max_length=128)
    ids = PROMPT.to(model.device)
    out = model.generate(ids, assistant_model=assistant, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out.cpu(), text)
    out = model.generate(ids, prompt_lookup_num_tokens=4, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out.cpu(), text)


def test_counts(tiny_moe):
    model = tiny_moe()
    r = spac.generate(
        model, PROMPT, draft=model, num_draft_tokens=4, max_new_tokens=26, return_result=True
    )
    assert r.new_tokens == 26 and r.sequences.shape == (1, 23 + 26)
    assert r.target_forwards == 5 and r.gammas == [4] * 5
    assert (r.drafted, r.accepted, r.acceptance) == (20, 20, 1.0)
    assert r.tokens_per_forward == 5.0 and r.tokens_per_second > 0
    assert r.draft_length_reason == "fixed at 4"


def test_end_of_sequence_and_limits(tiny_moe, expected):
    text = plain_text(tiny_moe, expected)
    model = tiny_moe()
    new = text[0, PROMPT.shape[1] :].tolist()
    stop = new[10]
    end = new.index(stop)
    for draft, gamma in itertools.product((None, model, "ngram"), (0, 3)):
        out = spac.generate(
            model,
            PROMPT,
            draft=draft,
            num_draft_tokens=gamma,
            max_new_tokens=NEW,
            eos_token_id=stop,
        )
        assert out[0, PROMPT.shape[1] :].tolist() == new[: end + 1]
        for limit in (1, 2, 7):
            out = spac.generate(
                model, PROMPT, draft=draft, num_draft_tokens=gamma, max_new_tokens=limit
            )
            assert out[0, PROMPT.shape[1] :].tolist() == new[:limit]


def test_streamer_gets_every_token_once(tiny_moe):
    class Keep:
        def __init__(self):
            self.tokens, self.ended = [], 0

        def put(self, ids):
            self.tokens += ids.reshape(-1).tolist()

        def end(self):
            self.ended += 1

    model, keep = tiny_moe(), Keep()
    out = spac.generate(
        model, PROMPT, draft=model, num_draft_tokens=3, max_new_tokens=17, streamer=keep
    )
    assert keep.tokens == out[0].tolist() and keep.ended == 1


@pytest.mark.parametrize("seeded", [True, False], ids=["seeds", "standard rule"])
def test_sampling_follows_the_target(tiny_moe, seeded):
    """Token counts at one position, by a chi-square test."""
    model = tiny_moe(vocab_size=12, num_hidden_layers=1)
    draft = tiny_moe(vocab_size=12, seed=3, num_hidden_layers=1)
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    options = {"do_sample": True, "temperature": 1.3, "top_k": 6, "max_new_tokens": 3}
    draws = 250
    with torch.no_grad():
        first = model(prompt).logits[0, -1] / 1.3
        first = torch.where(first >= first.topk(6).values[-1], first, -torch.inf).softmax(-1)
        second = torch.zeros(12)
        for token in first.nonzero()[:, 0]:
            row = model(torch.cat([prompt, token.view(1, 1)], dim=1)).logits[0, -1] / 1.3
            row = torch.where(row >= row.topk(6).values[-1], row, -torch.inf)
            second += first[token] * row.softmax(-1)
    counts = torch.zeros(12)
    torch.manual_seed(0)
    for seed in range(draws):
        options["seed"] = seed if seeded else None
        out = spac.generate(model, prompt, draft=draft, num_draft_tokens=2, **options)
        counts[out[0, 6]] += 1
    possible = second > 5 / draws
    other = ~possible
    observed = torch.cat([counts[possible], counts[other].sum()[None]])
    wanted = torch.cat([second[possible], second[other].sum()[None]]) * draws
    statistic = ((observed - wanted) ** 2 / wanted.clamp(min=0.5)).sum().item()
    assert statistic < 35, (observed, wanted)  # p < 0.001 for at most 12 classes


def test_a_seed_decides_the_text_whatever_the_draft(tiny_moe):
    model, other = tiny_moe(), tiny_moe(num_hidden_layers=1)
    options = {"do_sample": True, "max_new_tokens": 20, "temperature": 1.5, "top_p": 0.9}
    whole = {"return_result": True} | options
    plain, another = (spac.generate(model, PROMPT, seed=seed, **options) for seed in (5, 6))
    assert not torch.equal(plain, another)
    for draft, gamma in itertools.product(("ngram", other, model), (1, 4, "auto")):
        r = spac.generate(model, PROMPT, draft=draft, num_draft_tokens=gamma, seed=5, **whole)
        assert torch.equal(r.sequences, plain), (draft, gamma)
    assert r.acceptance == 1.0  # the target as its own draft sees the same noise
    torch.manual_seed(3)
    a, b = (spac.generate(model, PROMPT, draft=other, **options) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(a, spac.generate(model, PROMPT, draft=other, **options))
    assert not torch.equal(a, b)


def test_model_draft_forgets_rejected_tokens(tiny_moe):
    model = tiny_moe()
    draft = ModelDraft(model, 96)
    text, fed, verify = PROMPT[0].tolist(), [], draft.target.verify
    draft.target.verify = lambda window: (fed.append(window.numel()), verify(window))[1]
    for kept, gamma in ((0, 5), (3, 4), (4, 4), (2, 3), (0, 0), (0, 0), (0, 1), (1, 2), (0, 6)):
        got, probs = draft.propose(text, gamma)
        want, _ = ModelDraft(model, 96).propose(text, gamma)
        assert probs is None and torch.equal(got, want)
        text += [*got[:kept].tolist(), 95 - len(text)]  # the target goes elsewhere
        draft.accepted(kept)
    # What it has seen is not fed again: a prompt, three tokens after two windows without a draft.
    assert len(fed) == 5 + 4 + 4 + 3 + 1 + 2 + 6 - 2 and max(fed) == 2


def test_ngram_draft_prefers_the_longest_and_latest():
    for text, gamma, expected in (
        ([1, 2, 3, 9, 2, 3, 5, 6, 2, 3], 3, [5, 6, 2]),
        ([1, 2, 3, 9, 2, 3, 5, 6, 1, 2, 3], 2, [9, 2]),
        ([1, 2, 3, 9, 2, 3, 5, 6, 1, 2, 3], 0, []),
        ([1, 2, 3], 4, []),
        ([7], 4, []),
        ([7, 7], 4, [7]),
    ):
        drafted, _ = NgramDraft().propose(text, gamma)
        assert drafted.tolist() == expected and drafted.dtype == torch.int64


def _looked_up(text, gamma, longest=4):
    for n in range(min(longest, len(text) - 1), 0, -1):
        for start in range(len(text) - 1, n - 1, -1):
            if text[start - n : start] == text[-n:]:
                return text[start : start + gamma]
    return []


def test_ngram_draft_of_a_text_that_grows():
    rng, draft, text = random.Random(7), NgramDraft(), [1]
    for _ in range(200):
        gamma = rng.randrange(5)
        assert draft.propose(text, gamma)[0].tolist() == _looked_up(text, gamma)
        text += rng.choices(range(3), k=rng.randrange(1, 4))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_draft_tokens": -1}, "num_draft_tokens: expected 0..64"),
        ({"num_draft_tokens": "many"}, "num_draft_tokens: expected 0..64"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1"),
        ({"temperature": 0.0, "do_sample": True}, "temperature: must be positive"),
        ({"top_p": 1.5, "do_sample": True}, "top_p: expected"),
        ({"draft": "lookup"}, 'draft: expected a causal LM, "ngram" or None'),
    ],
)
def test_bad_arguments(tiny_moe, options, message):
    with pytest.raises(ValueError, match=message):
        spac.generate(tiny_moe(), PROMPT, **options)


def test_bad_inputs(tiny_moe):
    model = tiny_moe()
    with pytest.raises(ValueError, match=r"input_ids: expected \[1, n\]"):
        spac.generate(model, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="its vocabulary has 50 tokens, the target's 96"):
        spac.generate(model, PROMPT, draft=tiny_moe(vocab_size=50))


def test_a_recorder_sees_every_window_of_static_windows_too(tiny_moe, caplog):
    """Hooks do not run inside a CUDA graph."""
    settings = {"max_length": 64, "static_windows": True}
    model = tiny_moe()
    spac.attach(model, bytes_for_ratio(model, 0.3, SpacConfig(**settings)), **settings)
    prompt = torch.randint(0, 96, (1, 9))
    spac.generate(model, prompt, max_new_tokens=3)  # its windows are ready
    with Recorder(model) as recorder:
        spac.generate(model, prompt, max_new_tokens=6)
    assert recorder.trace().boundaries.tolist() == [0, 9, 10, 11, 12, 13, 14]
    assert "hooks on its experts" in caplog.text
    spac.detach(model)
