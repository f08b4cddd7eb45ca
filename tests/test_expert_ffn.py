"""Every path of the expert FFN against the reference in fp64, over all layouts and dtypes."""

import re
from dataclasses import replace

import pytest
import torch

from spac import reference
from spac.kernels.config import FFNConfig, Tile
from spac.kernels.expert_ffn import expert_ffn
from spac.kernels.grouped_tma import has_descriptors
from spac.layout import ACTIVATIONS, ExpertLayout, ExpertTable

SMALL = {
    "tokens": FFNConfig("tokens", Tile(16, 16, 32, 4, 3), Tile(16, 32, 16, 4, 3)),
    "grouped": FFNConfig("grouped", Tile(32, 16, 32, 4, 3), Tile(32, 32, 32, 4, 3)),
}


DESCRIPTORS = FFNConfig("descriptors", Tile(32, 16, 32, 4, 3, 16), Tile(32, 32, 32, 4, 3, 16))


def parameters(layout: ExpertLayout, device: str) -> list[torch.Tensor]:
    E, H, inter = layout.num_experts, layout.hidden, layout.intermediate
    shapes = [(E, 2 * inter, H), (E, H, inter)]
    if layout.transposed:
        shapes = [(e, b, a) for e, a, b in shapes]
    if layout.bias:
        shapes += [(E, 2 * inter), (E, H)]
    # Gate values of order 1, so that activations and clamps see both of their sides.
    return [(torch.randn(s, device=device) * 0.5).to(layout.dtype) for s in shapes]


def inputs(layout: ExpertLayout, tokens: int, top_k: int, device: str):
    x = torch.randn(tokens, layout.hidden, device=device).to(layout.dtype)
    ids = torch.rand(tokens, layout.num_experts, device=device).argsort(-1)[:, :top_k]
    weights = torch.rand(tokens, top_k, device=device)
    return x, ids.to(torch.int32), weights


def relative_error(y: torch.Tensor, truth: torch.Tensor) -> float:
    assert torch.isfinite(y).all()
    return float((y.double() - truth).norm() / truth.norm().clamp(min=1e-30))


def check(x, ids, weights, weight_tensors, layout, table, config, out_dtype=None):
    """At most twice the error of plain torch in the same dtype, both against fp64."""
    truth = reference.expert_ffn(
        x.double(), ids, weights.double(), *[w.double() for w in weight_tensors[:2]], layout,
        *[w.double() for w in weight_tensors[2:]],
    )  # fmt: skip
    y = expert_ffn(x, ids, weights, table, out_dtype, config)
    assert y.dtype == (out_dtype or x.dtype)
    plain = plain_error(x, ids, weights, weight_tensors, layout, truth)
    assert relative_error(y, truth) <= max(2 * plain, 2**-21)
    return y


def plain_error(x, ids, weights, weight_tensors, layout, truth) -> float:
    """Error of the same block with every product rounded to x.dtype, as eager experts do it."""
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    gate_up, down, *bias = weight_tensors
    for e in range(layout.num_experts):
        token, choice = torch.where(ids == e)
        w_gu, w_d = (gate_up[e].T, down[e].T) if layout.transposed else (gate_up[e], down[e])
        h = x[token] @ w_gu.T
        if bias:
            h = h + bias[0][e]
        gate, up = (h[:, ::2], h[:, 1::2]) if layout.interleaved else h.chunk(2, -1)
        out = reference.activate(gate, up, layout).to(x.dtype) @ w_d.T
        if bias:
            out = out + bias[1][e]
        out = (out * weights[token, choice, None].to(x.dtype)).float()
        y.index_add_(0, token, out)
    return relative_error(y.to(x.dtype), truth)


LAYOUTS = {
    "plain": {},
    "interleaved": {"interleaved": True},
    "transposed": {"transposed": True},
    "bias": {"bias": True},
    "gpt_oss": {
        "transposed": True,
        "interleaved": True,
        "bias": True,
        "activation": "swiglu_clamp",
        "alpha": 1.702,
        "limit": 1.0,
    },
}


@pytest.mark.parametrize("path", SMALL)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_layouts_and_dtypes(path, name, dtype, device):
    if dtype == torch.float16 and name not in ("plain", "gpt_oss"):
        pytest.skip("covered by the other two dtypes")
    torch.manual_seed(0)
    layout = ExpertLayout(5, 40, 24, dtype, **LAYOUTS[name])
    weight_tensors = parameters(layout, device)
    x, ids, weights = inputs(layout, 7, 2, device)
    table = ExpertTable.from_parameters(layout, *weight_tensors)
    check(x, ids, weights, weight_tensors, layout, table, SMALL[path])


@pytest.mark.parametrize("path", SMALL)
@pytest.mark.parametrize(
    "activation", [a for a in ACTIVATIONS if a not in ("silu", "swiglu_clamp")]
)
def test_activations(path, activation, device):
    torch.manual_seed(1)
    layout = ExpertLayout(3, 32, 16, torch.float32, activation=activation)
    weight_tensors = parameters(layout, device)
    x, ids, weights = inputs(layout, 4, 2, device)
    table = ExpertTable.from_parameters(layout, *weight_tensors)
    check(x, ids, weights, weight_tensors, layout, table, SMALL[path])


@pytest.mark.parametrize(
    "tokens, top_k, experts, hidden, inter",
    [
        (1, 1, 1, 1, 1),
        (1, 3, 9, 33, 17),
        (16, 6, 7, 50, 20),
        (17, 3, 4, 36, 33),
        (40, 2, 3, 48, 16),
    ],
)
@pytest.mark.parametrize("path", SMALL)
def test_odd_sizes(path, tokens, top_k, experts, hidden, inter, device):
    if path == "tokens" and tokens > 16:
        pytest.skip("at most 16 tokens")
    torch.manual_seed(2)
    layout = ExpertLayout(experts, hidden, inter, torch.float16)
    weight_tensors = parameters(layout, device)
    x, ids, weights = inputs(layout, tokens, top_k, device)
    table = ExpertTable.from_parameters(layout, *weight_tensors)
    check(x, ids.long(), weights, weight_tensors, layout, table, SMALL[path])


@pytest.mark.parametrize("path", SMALL)
def test_absent_experts_and_invalid_ids_add_nothing(path, device):
    torch.manual_seed(3)
    layout = ExpertLayout(6, 32, 16, torch.float32)
    weight_tensors = parameters(layout, device)
    x, ids, weights = inputs(layout, 9, 3, device)
    ids[0] = -1
    ids[1, 1] = 6  # the expert-parallel sentinel
    ids[2, 2] = 2**31 - 1
    ids = ids.long()
    ids[4, 2], ids[5, 1], ids[6, 0] = 2**32, 2**33 + 3, -(2**32)  # experts 0, 3 and 0 in 32 bits
    ids[3, 0] = ids[3, 1]  # chosen twice: both pairs count
    table = ExpertTable.from_parameters(layout, *weight_tensors)
    address = table.address.clone()
    address[2] = address[5] = 0
    table = replace(table, address=address)
    seen = torch.where((ids == 2) | (ids == 5), -1, ids)
    y = check(x, seen, weights, weight_tensors, layout, table, SMALL[path])
    assert torch.equal(y, expert_ffn(x, ids, weights, table, None, SMALL[path]))
    assert not y[0].any()


@pytest.mark.parametrize("path", SMALL)
def test_disjoint_tables_add_up_in_fp32(path, device):
    torch.manual_seed(4)
    layout = ExpertLayout(4, 32, 16, torch.bfloat16)
    weight_tensors = parameters(layout, device)
    x, ids, weights = inputs(layout, 6, 2, device)
    table = ExpertTable.from_parameters(layout, *weight_tensors)
    halves = [table.address * (torch.arange(4, device=device) % 2 == r) for r in (0, 1)]
    parts = [
        expert_ffn(x, ids, weights, replace(table, address=a), torch.float32, SMALL[path])
        for a in halves
    ]
    whole = expert_ffn(x, ids, weights, table, torch.float32, SMALL[path])
    assert relative_error(sum(parts), whole.double()) < (3e-3 if path == "grouped" else 1e-6)


@pytest.mark.parametrize("path", SMALL)
@pytest.mark.parametrize("interleaved", [False, True])
def test_blobs_in_any_order(path, interleaved, device):
    """Slots: experts lie where the address says, unrelated to their number."""
    torch.manual_seed(5)
    layout = ExpertLayout(4, 32, 24, torch.float16, interleaved=interleaved, bias=True)
    weight_tensors = parameters(layout, device)
    pool = torch.full((7, layout.blob_bytes), 255, dtype=torch.uint8, device=device)
    slots = [5, 0, 6, 2]
    for e, slot in enumerate(slots):
        for tensor, (offset, shape) in zip(weight_tensors, layout.sections().values(), strict=True):
            size = 2 * torch.Size(shape).numel()
            pool[slot, offset : offset + size] = tensor[e].reshape(-1).view(torch.uint8)
    address = pool.data_ptr() + layout.blob_bytes * torch.tensor(slots, device=device)
    table = ExpertTable.from_blobs(layout, address, owner=pool)
    x, ids, weights = inputs(layout, 5, 2, device)
    check(x, ids, weights, weight_tensors, layout, table, SMALL[path])


@pytest.mark.parametrize("path", SMALL)
def test_one_expert_takes_all_tokens(path, device):
    torch.manual_seed(6)
    layout = ExpertLayout(4, 32, 16, torch.float16)
    weight_tensors = parameters(layout, device)
    tokens = 16 if path == "tokens" else 70
    x, ids, weights = inputs(layout, tokens, 1, device)
    table = ExpertTable.from_parameters(layout, *weight_tensors)
    check(x, torch.full_like(ids, 2), weights, weight_tensors, layout, table, SMALL[path])


def test_nan_goes_through_the_clamps_of_activations(hopper_ptx):
    """As in torch and on the CPU. The interpreter's minimum gives NaN, that of PTX the other one
    unless it says NaN."""
    kernels = hopper_ptx("""
import torch
from spac.kernels.expert_ffn import expert_ffn
from spac.kernels.expert_ffn_backward import expert_ffn_backward
from spac.layout import ExpertLayout, ExpertTable
x, w = torch.zeros(3, 64).half(), (torch.zeros(2, 64, 64).half(), torch.zeros(2, 64, 32).half())
ids, weights = torch.zeros(3, 2).int(), torch.zeros(3, 2)
for activation in ("swiglu_clamp", "relu"):
    layout = ExpertLayout(2, 64, 32, x.dtype, activation=activation, alpha=1.7, limit=7.0)
    table = ExpertTable.from_parameters(layout, *w)
    expert_ffn(x, ids, weights, table)
    expert_ffn_backward(x, x, ids, weights, table, *w, frozen=True)
""")
    activating = ["_gate_up_tokens_kernel", "_gate_up_grouped_kernel", "_hidden_grad_kernel"]
    found = {name for name, _, code in kernels if re.search(r"\b(?:min|max)\.NaN\.f32", code)}
    assert found == set(activating)
    for name, _, code in kernels:
        assert not re.search(r"\b(?:min|max)\.f32", code), name


@pytest.mark.parametrize("tokens, top_k", [(1, 2), (16, 2), (20, 2), (300, 1)])
def test_default_configuration(tokens, top_k, device):
    torch.manual_seed(7)
    layout = ExpertLayout(3, 64, 32, torch.bfloat16)
    weight_tensors = parameters(layout, device)
    x, ids, weights = inputs(layout, tokens, top_k, device)
    table = ExpertTable.from_parameters(layout, *weight_tensors)
    y = check(x, ids, weights, weight_tensors, layout, table, None)
    assert torch.equal(y, expert_ffn(x, ids, weights, table))  # bitwise repeatable


def test_strided_x_and_no_tokens(device):
    torch.manual_seed(8)
    layout = ExpertLayout(3, 32, 16, torch.float32)
    weight_tensors = parameters(layout, device)
    x, ids, weights = inputs(layout, 6, 2, device)
    table = ExpertTable.from_parameters(layout, *weight_tensors)
    wide = torch.randn(6, 70, device=device)
    wide[:, 3:35] = x
    check(wide[:, 3:35], ids, weights, weight_tensors, layout, table, SMALL["tokens"])
    check(x.T.contiguous().T, ids, weights, weight_tensors, layout, table, SMALL["tokens"])
    assert expert_ffn(x[:0], ids[:0], weights[:0], table).shape == (0, 32)


def test_arguments_are_checked(device):
    layout = ExpertLayout(3, 32, 16, torch.float32)
    table = ExpertTable.from_parameters(layout, *parameters(layout, device))
    x, ids, weights = inputs(layout, 4, 2, device)
    with pytest.raises(ValueError, match=r"x: expected \[T, 32\] in torch.float32, got .*float16"):
        expert_ffn(x.half(), ids, weights, table)
    with pytest.raises(ValueError, match=r"ids and weights: expected \[4, k\]"):
        expert_ffn(x, ids[:3], weights, table)
    with pytest.raises(ValueError, match=r"table.address: expected int64 \[3\]"):
        expert_ffn(x, ids, weights, replace(table, address=table.address[:2]))


@pytest.mark.parametrize("path", SMALL)
@pytest.mark.parametrize("name", ["plain", "interleaved", "bias"])
def test_streamed_experts_are_stored_on_the_way(path, name, device):
    """Blobs of the experts that were used and have a destination arrive there, and only they."""
    torch.manual_seed(5)
    layout = ExpertLayout(6, 40, 24, torch.bfloat16, **LAYOUTS[name])
    weight_tensors = parameters(layout, device)
    source = torch.zeros(6, layout.blob_bytes, dtype=torch.uint8, device=device)
    for section, tensor in zip(("gate_up", "down", "gate_up_bias", "down_bias"), weight_tensors,
                               strict=False):  # fmt: skip
        offset = layout.sections()[section][0]
        data = tensor.reshape(6, -1).view(torch.uint8)
        source[:, offset : offset + data.shape[1]] = data
    slots = torch.zeros_like(source)
    step = layout.blob_bytes * torch.arange(6, device=device)
    copy_to = torch.where(torch.arange(6, device=device) < 4, slots.data_ptr() + step, 0)
    tokens = 7 if path == "tokens" else 90  # several tiles of an expert
    x, ids, weights = inputs(layout, tokens, 2, device)
    ids[ids == 1] = 3
    table = ExpertTable.from_blobs(layout, source.data_ptr() + step)
    copying = replace(table, copy_to=copy_to)
    check(x, ids, weights, weight_tensors, layout, copying, SMALL[path])
    assert torch.equal(expert_ffn(x, ids, weights, copying), expert_ffn(x, ids, weights, table))
    for e in range(6):
        arrived = e < 4 and bool((ids == e).any())
        assert torch.equal(slots[e], source[e] if arrived else torch.zeros_like(source[e]))


@pytest.mark.parametrize("name, dtype", [
    ("plain", torch.bfloat16), ("plain", torch.float16), ("interleaved", torch.float16),
], ids=str)  # fmt: skip
def test_descriptors(name, dtype, device):
    """Tiles of both heights, an absent expert, ids without an expert."""
    torch.manual_seed(9)
    layout = ExpertLayout(5, 64, 40, dtype, **LAYOUTS[name])
    weight_tensors = parameters(layout, device)
    x, ids, weights = inputs(layout, 70, 2, device)
    ids[:30, 0], ids[:30, 1] = 1, 0
    ids[3, 1], ids[4, 0] = -1, 5
    table = ExpertTable.from_parameters(layout, *weight_tensors)
    address = table.address.clone()
    address[2] = 0
    table = replace(table, address=address, slots=replace(table.slots, address=address))
    seen = torch.where(ids == 2, -1, ids)
    y = check(x, seen, weights, weight_tensors, layout, table, DESCRIPTORS)
    assert torch.equal(y, expert_ffn(x, ids, weights, table, None, DESCRIPTORS))


def test_descriptors_of_slots_in_any_order(device):
    torch.manual_seed(10)
    layout = ExpertLayout(3, 64, 24, torch.float16)
    weight_tensors = parameters(layout, device)
    pool = torch.full((6, layout.blob_bytes), 255, dtype=torch.uint8, device=device)
    slots = [4, 0, 5]
    for e, slot in enumerate(slots):
        for tensor, (offset, shape) in zip(weight_tensors, layout.sections().values(), strict=True):
            size = 2 * torch.Size(shape).numel()
            pool[slot, offset : offset + size] = tensor[e].reshape(-1).view(torch.uint8)
    address = pool.data_ptr() + layout.blob_bytes * torch.tensor(slots, device=device)
    table = ExpertTable.from_blobs(layout, address, memory=pool)
    x, ids, weights = inputs(layout, 40, 2, device)
    check(x, ids, weights, weight_tensors, layout, table, DESCRIPTORS)


def test_which_tables_have_descriptors(device):
    def table(hidden=64, dtype=torch.float16, **options):
        layout = ExpertLayout(3, hidden, 24, dtype, **options)
        return ExpertTable.from_parameters(layout, *parameters(layout, device))

    plain = table()
    assert has_descriptors(plain) and has_descriptors(table(interleaved=True))
    # Weights that can, and a hidden layer that cannot: 20 columns of rows of 24.
    gate_up, down = parameters(ExpertLayout(3, 64, 24, torch.float16), device)
    padded = ExpertTable.from_parameters(
        ExpertLayout(3, 64, 20, torch.float16), gate_up[:, :40], down[..., :20]
    )
    gate_up, down = parameters(plain.layout, device)
    expanded = [(gate_up[:1].expand_as(gate_up), down), (gate_up, down[:1].expand_as(down))]
    others = [
        *(ExpertTable.from_parameters(plain.layout, *tensors) for tensors in expanded),
        padded,
        table(hidden=72),
        table(dtype=torch.float32),
        table(bias=True),
        table(transposed=True),
    ]
    others += [replace(plain, address=plain.address.clone()), replace(plain, copy_to=plain.address)]
    others += [ExpertTable.from_blobs(plain.layout, plain.address)]
    assert not any(has_descriptors(t) for t in others)
    x, ids, weights = inputs(others[2].layout, 4, 2, device)
    with pytest.raises(ValueError, match="config: this table cannot be read through descriptors"):
        expert_ffn(x, ids, weights, others[2], None, DESCRIPTORS)
