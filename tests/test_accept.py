"""Accept kernels against the reference, and the distribution of what they emit."""

import pytest
import torch

from spac import reference
from spac.kernels.accept import accept_greedy, accept_sample


def agreeing_draft(logits: torch.Tensor, first_wrong: int) -> torch.Tensor:
    draft = logits.argmax(-1)[:-1].clone()
    if first_wrong < draft.numel():
        draft[first_wrong] = (draft[first_wrong] + 1) % logits.shape[1]
    return draft


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("W, V", [(1, 5), (2, 1), (5, 3001), (9, 70)])
def test_greedy_is_the_reference(W, V, dtype, device):
    torch.manual_seed(V)
    logits = torch.randn(W, V, device=device).to(dtype)  # 16-bit logits tie often
    for wrong in range(W):
        draft = agreeing_draft(logits, wrong)
        assert torch.equal(accept_greedy(logits, draft), reference.accept_greedy(logits, draft))


def test_greedy_takes_the_lowest_index_of_a_tie(device):
    logits = torch.zeros(2, 3000, device=device)
    logits[0, [2500, 1100, 40]] = 1.0
    logits[1, [2999, 1024]] = 1.0
    draft = torch.tensor([40], device=device)
    assert accept_greedy(logits, draft).tolist() == [1, 1024]
    assert accept_greedy(logits.neg(), draft).tolist() == [0, 0]


def test_greedy_with_minus_infinity_and_strides(device):
    logits = torch.full((3, 50), float("-inf"), device=device)
    logits[0, 7] = -5.0
    logits[1, 49] = -1e30
    draft = torch.tensor([7, 49], device=device)
    assert accept_greedy(logits, draft).tolist() == [2, 0]
    turned = torch.randn(60, 4, device=device).T
    draft = agreeing_draft(turned, 2)
    assert torch.equal(accept_greedy(turned, draft), reference.accept_greedy(turned, draft))


def distributions(W, V, device):
    logits = torch.randn(W, V, device=device) * 2
    logits[:, V // 2 :: 3] = float("-inf")  # what top-k and top-p leave behind
    probs = torch.softmax(torch.randn(W - 1, V, device=device) * 2, -1)
    return logits, probs


@pytest.mark.parametrize("one_hot", [True, False])
@pytest.mark.parametrize("W, V", [(1, 9), (2, 2100), (6, 40)])
def test_sample_is_the_reference(W, V, one_hot, device):
    torch.manual_seed(W)
    logits, probs = distributions(W, V, device)
    for _ in range(4):
        draft = torch.multinomial(probs, 1)[:, 0] if W > 1 else torch.empty(0, dtype=torch.int64)
        draft = draft.to(device)
        q = None if one_hot else probs
        u = torch.rand(W, device=device)
        ours = accept_sample(logits, draft, q, u)
        assert torch.equal(ours, reference.accept_sample(logits, draft, q, u))


def test_sample_at_the_ends_of_the_distribution(device):
    """u = 0 is the first possible token, the largest u below 1 the last one."""
    logits = torch.full((1, 2050), float("-inf"), device=device)
    logits[0, [3, 1500, 2047]] = torch.tensor([0.0, 1.0, -10.0], device=device)
    draft = torch.empty(0, dtype=torch.int64, device=device)
    ends = [accept_sample(logits, draft, None, torch.tensor([u], device=device))[1].item()
            for u in (0.0, 0.5, 1 - 2**-24)]  # fmt: skip
    assert ends == [3, 1500, 2047]


def test_a_certain_draft_is_accepted_and_an_impossible_one_never_drawn(device):
    logits = torch.tensor([[0.0, float("-inf"), 3.0]] * 2, device=device)
    impossible = torch.tensor([1], device=device)
    for u in (0.0, 0.3, 0.999):
        both = torch.tensor([u, u], device=device)
        accepted, token = accept_sample(logits, impossible, None, both).tolist()
        assert accepted == 0 and token != 1
    certain = torch.tensor([[float("-inf"), 0.0, float("-inf")]] * 2, device=device)
    nearly_one = torch.full((2,), 1 - 2**-24, device=device)
    assert accept_sample(certain, impossible, None, nearly_one).tolist() == [1, 1]


@pytest.mark.parametrize("one_hot", [True, False])
def test_first_token_follows_the_target_distribution(one_hot, device):
    """Chi-square over 6 tokens: whatever the draft says, the first token has law p (p = 1e-4)."""
    torch.manual_seed(11)
    V, runs = 6, 4000 if device == "cuda" else 60
    logits, probs = torch.randn(2, V, device=device), None
    p = torch.softmax(logits[0].double(), -1)
    q = torch.softmax(torch.randn(1, V, device=device) * 1.5, -1)
    drafts = torch.full((runs,), 2, device=device) if one_hot else torch.multinomial(
        q[0], runs, replacement=True
    )  # fmt: skip
    probs = None if one_hot else q
    counts = torch.zeros(V)
    for run in range(runs):
        u = torch.rand(2, device=device)
        accepted, token = accept_sample(logits, drafts[run : run + 1], probs, u).tolist()
        counts[drafts[run].item() if accepted else token] += 1
    expected = p.cpu().float() * runs
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 25.7  # 5 degrees of freedom, 1e-4


def test_arguments_are_checked(device):
    logits = torch.zeros(3, 8, device=device)
    draft = torch.zeros(2, dtype=torch.int64, device=device)
    u = torch.zeros(3, device=device)
    with pytest.raises(ValueError, match=r"logits: expected \[2, V\], got \[3, 8\]"):
        accept_greedy(logits, draft[:1])
    with pytest.raises(ValueError, match=r"u: expected \[3\], got \[2\]"):
        accept_sample(logits, draft, None, u[:2])
    with pytest.raises(ValueError, match=r"draft_probs: expected \[2, 8\], got \[3, 8\]"):
        accept_sample(logits, draft, torch.zeros(3, 8, device=device), u)
