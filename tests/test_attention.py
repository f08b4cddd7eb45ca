"""Grouped attention over a masked cache: the sums of transformers' sdpa, without its copies."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from spac.attention import grouped, grouped_attention


class Attention(torch.nn.Module):
    is_causal = True

    def __init__(self, groups):
        super().__init__()
        self.num_key_value_groups = groups


@pytest.mark.parametrize("heads, kv", [(8, 2), (4, 4), (6, 1)])
@pytest.mark.parametrize("width", [1, 5, 70])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_is_the_sdpa_of_transformers(heads, kv, width, scaling, device):
    query = torch.randn(2, width, heads, 16, device=device, dtype=torch.float64).transpose(1, 2)
    key, value = torch.randn(2, 2, kv, 37, 16, device=device, dtype=torch.float64)
    mask = torch.zeros(2, 1, width, 37, device=device, dtype=torch.float64)
    mask.masked_fill_(torch.rand_like(mask) < 0.5, torch.finfo(torch.float64).min)
    args = Attention(heads // kv), query, key, value, mask
    ours, _ = grouped_attention(*args, scaling=scaling, dropout=0.0)
    truth, _ = sdpa_attention_forward(*args, scaling=scaling, dropout=0.0)
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, truth)


def test_the_model_has_its_own_attention_afterwards(tiny_moe):
    model, ids = tiny_moe(), torch.randint(0, 96, (1, 9))
    with torch.no_grad():
        expected = model(ids).logits
        with grouped(model):
            assert model.config._attn_implementation != "sdpa"
            torch.testing.assert_close(model(ids).logits, expected)
    assert model.config._attn_implementation == "sdpa"
