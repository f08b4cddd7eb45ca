"""`spac.generate` on families with other caches than the plain one, against their own text."""

import pytest
import torch
import transformers

import spac

SMALL = {
    "vocab_size": 67,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 36,
    "moe_intermediate_size": 20,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 24,
    "head_dim": 12,
}
INDEXED = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_group": 2,
    "topk_group": 1,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 64,
}
FAMILIES = {
    "Lfm2Moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "GptOss": {"num_local_experts": 8, "head_dim": 12, "sliding_window": 16},
    "DeepseekV32": INDEXED,
    "Gemma4Text": {
        "head_dim": 12,
        "global_head_dim": 24,
        "enable_moe_block": True,
        "top_k_experts": 3,
        "vocab_size_per_layer_input": 67,
        "hidden_size_per_layer_input": 8,
        "sliding_window": 16,
    },
}
CLASSES = {"Gemma4Text": "Gemma4ForCausalLM"}


def build(family, overrides, seed=0):
    config = getattr(transformers, f"{family}Config")(**SMALL | overrides)
    torch.manual_seed(seed)
    model = getattr(transformers, CLASSES.get(family, f"{family}ForCausalLM"))(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = None
    return model


def prompt(device):
    """Its second half is its first, so that prompt lookup finds something."""
    return torch.randint(3, 67, (1, 9)).repeat(1, 2).to(device)


def greedy(model, ids):
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=20, do_sample=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_the_models_own(family, device):
    plain, model = (build(family, FAMILIES[family]).to(device) for _ in range(2))
    ids = prompt(device)
    expected = greedy(plain, ids)
    spac.attach(model, "1GiB", max_length=64)
    for draft in (None, "ngram", plain):
        text = spac.generate(
            model, ids, max_new_tokens=20, draft=draft, num_draft_tokens=4, return_result=True
        )
        assert text.sequences.tolist() == expected.tolist()
        if draft is plain:
            assert text.accepted > 8
    spac.detach(model)


def test_recurrent_layers_take_no_draft(device):
    plain, model = (build("Qwen3Next", LINEAR).to(device) for _ in range(2))
    ids = prompt(device)
    spac.attach(model, "1GiB", max_length=64)
    text = spac.generate(model, ids, max_new_tokens=20)
    assert text.tolist() == greedy(plain, ids).tolist()
    dense = build("GptOss", FAMILIES["GptOss"]).to(device)
    for target, draft in ((model, "ngram"), (model, dense), (dense, plain)):
        with pytest.raises(ValueError, match="draft: Qwen3NextForCausalLM has recurrent layers"):
            spac.generate(target, ids, draft=draft)
    spac.detach(model)


def test_what_a_vision_model_saw_before_does_not_count(device):
    text = SMALL | {
        "head_dim": 12,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 48,
        "deepstack_visual_indexes": [0],
    }
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model = transformers.Qwen3VLMoeForConditionalGeneration(config).eval().to(device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ids = prompt(device)
    expected = greedy(model, ids)
    greedy(model, ids.repeat(2, 1))  # leaves the model with an offset of positions for each
    spac.attach(model, "1GiB", max_length=64)
    assert spac.generate(model, ids, max_new_tokens=20).tolist() == expected.tolist()
    spac.detach(model)
