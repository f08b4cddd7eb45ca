"""Kernels that start early: what their machine code does before it waits, and who may be one."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import StaticCache

from spac.decoder import few_launches
from spac.kernels import fused_linear, pdl
from spac.kernels.route import route
from spac.kernels.split_window import split_window
from spac.layout import Places

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
# What a decoder layer launches.
LAYER = """
from spac.kernels import fused_linear, route, split_window, window_attention
from spac.layout import Places
early = lambda device, chained=True, read_early=(): {"EARLY": MODE, "launch_pdl": chained}
for module in (fused_linear, route, split_window, window_attention):
    module.pdl_args = early
x, w, norm = (torch.zeros(s, dtype=torch.float16) for s in ((9, 512), (512, 512), (512,)))
parts, turn = torch.zeros(2, 9, 512), torch.zeros(9, 128, dtype=torch.float16)
cache = torch.zeros(1, 64, 128, dtype=torch.float16)
fused_linear.add_norm(x, parts, norm, 1e-6, False)
fused_linear.fused_linear(x, [w])
fused_linear.fused_gated(x, w, w, "silu")
route.route(parts, 8, True, x.dtype, True)
window_attention.window_attention(
    parts, turn, turn, norm[:128], norm[:128], 1e-6, cache, cache, torch.tensor(7), 1.0
)
addresses, small = torch.zeros(60, dtype=torch.int64), torch.zeros(60, dtype=torch.int32)
state = addresses, addresses, small, small[:2], addresses[:4], addresses
state = *state, torch.zeros(61, dtype=torch.int32), addresses[:1], 5
exchanged = torch.zeros(1, 8, 2, dtype=torch.int32)
places = Places.over(torch.zeros(8, 256, dtype=torch.uint8), torch.zeros(1, 60), exchanged)[0]
for room in (places, None):
    split_window.split_window(torch.zeros(9, 8, dtype=torch.int32), *state, room, True)
"""
# The norm's weight; the length of the cache, only to know what to prefetch.
BEFORE = {
    (pdl.WAIT, "_add_norm_kernel"): {"ld.global": 1},
    (pdl.WEIGHTS, "_add_norm_kernel"): {"ld.global": 1},
    (pdl.WEIGHTS, "_window_attention_kernel"): {"ld.global": 1},
}
PREFETCHES = {"_linear_kernel": 1, "_gated_kernel": 2, "_window_attention_kernel": 2}
# Memory accesses of a kernel.
TOUCHED = r"\b(?:ld\.global|st\.global|cp\.async\.c[ag]|atom|red\.)"


@pytest.fixture(scope="module")
def layers(hopper_ptx):
    """Kernels of a layer by mode, of one process for all modes."""
    modes = pdl.WAIT, pdl.WEIGHTS
    kernels = hopper_ptx("".join(LAYER.replace("MODE", str(mode)) for mode in modes))
    each = len(kernels) // len(modes)
    return {mode: kernels[i * each : (i + 1) * each] for i, mode in enumerate(modes)}


@pytest.mark.parametrize("mode", [pdl.WAIT, pdl.WEIGHTS])
def test_nothing_that_others_write_is_touched_before_the_wait(mode, layers):
    kernels = layers[mode]
    assert sorted(name for name, _, _ in kernels) == sorted([
        "_add_norm_kernel", "_linear_kernel", "_gated_kernel", "_route_kernel",
        "_window_attention_kernel", "_sum_parts_kernel", *["_split_window_kernel"] * 2,
    ])  # fmt: skip
    for name, early, kernel in kernels:
        assert early == (name != "_add_norm_kernel")
        before, after = kernel.split("griddepcontrol.wait")
        assert "st.global" in after and re.search(TOUCHED, after)
        assert "launch_dependents" not in after
        if name == "_split_window_kernel":
            reads_state_only(before, after)
            continue
        assert "griddepcontrol.launch_dependents" in before
        assert Counter(re.findall(TOUCHED, before)) == BEFORE.get((mode, name), {}), name
        fetched = before.count("cp.async.bulk.prefetch.L2.global")
        assert fetched == (PREFETCHES.get(name, 0) if mode == pdl.WEIGHTS else 0)


def reads_state_only(before, after):
    """split_window loads before the wait, but not through its first argument, the ids; kernels that
    wait for others stand behind it, so it lets nobody start."""
    assert set(re.findall(TOUCHED, before)) == {"ld.global"}
    assert "launch_dependents" not in before
    from_ids = set()
    for line in (before + after).splitlines():
        found = re.findall(r"%\w+", line)
        if "_split_window_kernel_param_0]" in line or from_ids.intersection(found[1:]):
            from_ids.update(found[:1])
        if "ld.global" in line and line in before:
            assert not from_ids.intersection(found), line
    assert any(
        "ld.global" in x and from_ids & set(re.findall(r"%\w+", x)) for x in after.split("\n")
    )


def test_kernels_that_wait_for_others_neither_start_early_nor_let_anyone():
    for name in ("tokens", "handoff", "pull"):
        assert "pdl" not in (KERNELS / f"{name}.py").read_text()
    assert "let_next_start" not in (KERNELS / "split_window.py").read_text()


def test_only_hopper_starts_early(monkeypatch):
    assert pdl.pdl_args(torch.device("cpu")) == {"EARLY": pdl.OFF}
    found = {"major": 9}
    monkeypatch.setattr(pdl, "device_of", lambda device: type("Device", (), found))
    device = torch.device("cuda")
    assert pdl.pdl_args(device) == {"EARLY": pdl.WEIGHTS, "launch_pdl": True}
    assert pdl.pdl_args(device, False) == {"EARLY": pdl.WEIGHTS, "launch_pdl": False}
    whole = torch.zeros(6, 24, dtype=torch.float16)
    for tensor, mode in ((whole, pdl.WEIGHTS), (whole[:, :12], pdl.WAIT), (whole[0, 1:], pdl.WAIT)):
        assert pdl.pdl_args(device, read_early=[whole, tensor])["EARLY"] == mode
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert pdl.pdl_args(device) == {"EARLY": pdl.OFF}
    monkeypatch.setattr(torch.version, "hip", None)
    found["major"] = 8
    assert pdl.pdl_args(device) == {"EARLY": pdl.OFF}
    found["major"] = 10
    monkeypatch.setattr(pdl, "MODE", pdl.OFF)
    assert pdl.pdl_args(device) == {"EARLY": pdl.OFF}


@torch.no_grad()
def test_no_norm_starts_early_behind_experts(tiny_moe, device, monkeypatch):
    chained, real = [], fused_linear.add_norm
    monkeypatch.setattr(
        fused_linear, "add_norm", lambda *args: chained.append(args[4:]) or real(*args)
    )
    model = tiny_moe(mlp_only_layers=[1]).to(device)  # of three
    cache = StaticCache(config=model.config, max_cache_len=64)
    with few_launches(model):
        model(torch.randint(0, 96, (1, 3), device=device), past_key_values=cache)
    assert chained == [(False,), (), (False,), (), (True,), (), (False,)]


@pytest.mark.skipif(not HOPPER, reason="no GPU that starts kernels early")
def test_every_mode_gives_the_same_bits(monkeypatch):
    """Chains in which a kernel that runs ahead reads what is not there yet."""
    x = torch.randn(3, 1024, device="cuda").bfloat16()
    weights = [torch.randn(3, 1536, 1024, device="cuda").bfloat16() / 32 for _ in range(12)]
    norm = torch.rand(1024, device="cuda").bfloat16()

    def chain():
        hidden, parts = x, None
        for gate, up, down in weights:
            hidden, h = fused_linear.add_norm(hidden, parts, norm, 1e-6)
            h = fused_linear.fused_gated(h, gate, up, "silu")
            parts = fused_linear.fused_linear(h, [down.view(1024, 1536)])
        return hidden

    results = {}
    for mode in (pdl.OFF, pdl.WAIT, pdl.WEIGHTS):
        monkeypatch.setattr(pdl, "MODE", mode)
        chain()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results[mode] = chain()
        for _ in range(20):
            results[mode].fill_(float("nan"))
            graph.replay()
            assert torch.equal(results[mode], results[pdl.OFF])
    assert results[pdl.OFF].isfinite().all()


@pytest.mark.skipif(not HOPPER, reason="no GPU that starts kernels early")
def test_layers_are_decided_alike_beside_and_behind_the_router():
    layers, W, k, E, room = 24, 9, 8, 128, 8
    logits = torch.randn(layers, 1, W, E, device="cuda")
    address, host = 256 * torch.randint(1, 2**50, (2, layers, E), device="cuda")
    address[torch.rand(layers, E, device="cuda") < 0.7] = 0
    counts = torch.randint(0, 2**40, (layers, 4 + E + 1), device="cuda")
    small = torch.randint(0, 6, (layers, E + 2), dtype=torch.int32, device="cuda")
    streams = torch.full((E + 1,), 3, dtype=torch.int32, device="cuda")
    memory = torch.empty(room, 256, dtype=torch.uint8, device="cuda")
    value = torch.rand(layers, E, device="cuda") * 4
    found = []
    for chained in (False, True):
        exchanged = torch.zeros(layers, room, 2, dtype=torch.int32, device="cuda")
        places = Places.over(memory, value, exchanged)
        own = address.clone(), counts.clone(), small.clone()
        first = [t.clone() for t in own]

        def window(chained=chained, own=own, places=places):
            results = []
            for layer, (a, c, s) in enumerate(zip(*own, strict=True)):
                _, ids = route(logits[layer], k, True, torch.bfloat16, True)
                state = s[:E], s[E:], c[:4], c[4 : 4 + E], streams, c[4 + E :]
                results += split_window(ids, a, host[layer], *state, 5, places[layer], chained)
            return results

        window()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = window()
        for t, before in zip(own, first, strict=True):
            t.copy_(before)
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        found.append([*results, *own, exchanged])
    assert not torch.equal(found[0][-2], small)
    for behind, beside in zip(*found, strict=True):
        assert torch.equal(behind, beside)
