"""Quantised weights: their error, how they lie in a blob, and the C++ FFN that reads them."""

from dataclasses import replace

import pytest
import torch

from spac import _C, reference  # noqa: F401  (_C loads the operators)
from spac.kernels.config import FFNConfig, Tile
from spac.kernels.expert_ffn import expert_ffn as gpu_expert_ffn
from spac.layout import ExpertLayout, ExpertTable
from spac.ops import expert_ffn_table
from spac.quantize import dequantize, dequantize_rows, quantize, quantize_rows
from spac.store import blob_views

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
FORMS = {"int8": ("int8", 0), "int4/32": ("int4", 32), "int4/128": ("int4", 128)}
each_form = pytest.mark.parametrize("form, group", FORMS.values(), ids=FORMS)


def supported_isas() -> list[str]:
    out = ["portable"]
    for isa in ("avx2", "avx512"):
        try:
            torch.ops.spac.set_cpu_isa(isa)
            out.append(isa)
        except RuntimeError:
            pass
    torch.ops.spac.set_cpu_isa("")
    return out


@pytest.fixture(params=supported_isas())
def isa(request):
    torch.ops.spac.set_cpu_isa(request.param)
    yield request.param
    torch.ops.spac.set_cpu_isa("")
    torch.ops.spac.set_cpu_threads(0)


@each_form
@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e-6, 1e-3, 1.0, 1e4])
def test_error_of_a_weight(form, group, size):
    """|w - s q| <= s / 2, at every magnitude and with outliers."""
    w = torch.randn(7, 256, dtype=torch.float64) * size
    w[1, 3], w[2], w[3, :40], w[4] = 300 * size / 10, 0, 0, w[4].abs()
    w = w.to(F32)
    q, scale = quantize_rows(w, form, group)
    back = dequantize_rows(q, scale, form, torch.float64)
    step = scale.double() if form == "int8" else scale.double().repeat_interleave(group, -1)
    assert ((w.double() - back).abs() <= step / 2 * (1 + 2**-16)).all()
    assert torch.equal(back[2], torch.zeros(256, dtype=torch.float64))
    if size >= 1e-3:  # and scales are as small as they can be
        limit = 127 if form == "int8" else 7
        most = w.double().abs() if form == "int8" else w.double().abs().unflatten(-1, (-1, group))
        assert (scale.double() * limit <= most.amax(-1).reshape(scale.shape) * 1.08).all()


RMS = [("int8", 0, 0.011), ("int4", 32, 0.1), ("int4", 128, 0.12)]


@pytest.mark.parametrize("form, group, rms", RMS)
def test_error_of_normal_weights(form, group, rms):
    w = torch.randn(64, 2048)
    back = dequantize_rows(*quantize_rows(w, form, group), form)
    error = ((w - back).norm() / w.norm()).item()
    assert rms / 2 < error < rms


def test_bytes_of_int4():
    w = torch.arange(-7, 9).repeat(2).float()[None] * 0.875  # up to 7: the scale is 1
    q, scale = quantize_rows(w, "int4", 32)
    assert scale.tolist() == [[1.0]] and q.dtype == torch.uint8 and q.shape == (1, 16)
    expected = [round(v) + 8 for v in w[0].tolist()]
    assert [b & 15 for b in q[0].tolist()] == expected[::2]
    assert [b >> 4 for b in q[0].tolist()] == expected[1::2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_weights_that_cannot_be_quantised(bad):
    w = torch.ones(2, 64)
    w[1, 5] = bad
    with pytest.raises(ValueError, match="finite"):
        quantize_rows(w, "int4", 32)
    with pytest.raises(ValueError, match="groups of 32"):
        quantize_rows(torch.ones(2, 40), "int4", 32)
    with pytest.raises(ValueError, match="int8 or int4"):
        quantize_rows(w, "int3")


def test_layouts_that_cannot_be():
    layout = ExpertLayout(2, 96, 64, BF16, transposed=True)
    assert not layout.quantized("int8").transposed and layout.quantized("int4").group == 32
    with pytest.raises(ValueError, match="multiples of group 128"):
        layout.quantized("int4", 128)
    with pytest.raises(ValueError, match="one of"):
        layout.quantized("int4", 64)
    with pytest.raises(ValueError, match="only for form int4"):
        layout.quantized("int8", 32)
    with pytest.raises(ValueError, match="form: expected"):
        layout.quantized("int2")


class Case:
    """Quantised experts in poisoned memory, and a routing."""

    def __init__(
        self, E, H, inter, T, k, form, group, *, x_dtype=BF16, ids=None, seed=0, **options
    ):
        g = torch.Generator().manual_seed(seed)
        plain = ExpertLayout(E, H, inter, options.pop("dtype", BF16), **options)
        self.layout = plain.quantized(form, group)
        shapes = {name: shape for name, (_, shape) in plain.sections().items()}
        weights = {n: torch.randn(E, *s, generator=g) * 0.3 for n, s in shapes.items()}
        self.sections = quantize(weights, self.layout)
        self.memory = torch.full((E, self.layout.blob_bytes), 0xFF, dtype=torch.uint8)
        for name, view in blob_views(self.memory, self.layout).items():
            view.copy_(self.sections[name])
        address = self.memory.data_ptr() + self.layout.blob_bytes * torch.arange(E)
        self.table = ExpertTable.from_blobs(self.layout, address, self.memory)
        self.x = torch.randn(T, H, generator=g).to(x_dtype)
        random = torch.rand(T, E, generator=g).argsort(-1)[:, :k].to(torch.int32)
        self.ids = random if ids is None else ids
        self.weights = torch.rand(T, self.ids.shape[1], generator=g)

    def to(self, device: str) -> None:
        """Move everything; the addresses follow the blobs."""
        self.memory, self.x, self.ids, self.weights = (
            t.to(device) for t in (self.memory, self.x, self.ids, self.weights)
        )
        self.sections = {name: t.to(device) for name, t in self.sections.items()}
        E, size = self.memory.shape
        address = self.memory.data_ptr() + size * torch.arange(E, device=device)
        self.table = ExpertTable.from_blobs(self.layout, address, self.memory)

    def run(self) -> torch.Tensor:
        return expert_ffn_table(self.x, self.ids, self.weights, self.table, backend="cpu")

    def exact(self, x=None) -> torch.Tensor:
        x = self.x.double() if x is None else x
        return reference.expert_ffn_quantized(
            x, self.ids, self.weights.to(x.dtype), self.sections, self.layout
        )

    def check(self, y: torch.Tensor) -> None:
        """At most twice the error of plain torch with the same weights (DESIGN section 6).

        Plain torch multiplies in the dtype of x; integer products have 15 bits beside bf16's 8 and
        fp16's 11.
        """
        exact, dtype = self.exact(), self.x.dtype
        w = {n: t.to(dtype) for n, t in dequantize(self.sections, self.layout).items()}
        plain = torch.zeros_like(exact)
        for e in range(self.layout.num_experts):
            token, choice = torch.where(self.ids == e)
            bias = w["gate_up_bias"][e] if self.layout.bias else 0
            h = self.x[token] @ w["gate_up"][e].T + bias
            gate, up = (h[:, ::2], h[:, 1::2]) if self.layout.interleaved else h.chunk(2, -1)
            out = reference.activate(gate, up, self.layout) @ w["down"][e].T
            out = out + (w["down_bias"][e] if self.layout.bias else 0)
            plain.index_add_(0, token, (out * self.weights[token, choice, None].to(dtype)).double())
        error, allowed = (y - exact).norm().item(), (plain - exact).norm().item()
        assert error <= 2 * allowed + 2**-22 * exact.norm().item(), (error, allowed)


@each_form
@pytest.mark.parametrize("shape", [(1, 128, 128, 1, 1), (5, 256, 384, 3, 3), (3, 384, 128, 23, 2)])
@pytest.mark.parametrize("x_dtype", [BF16, F16, F32], ids=str)
def test_ffn_against_fp64(isa, form, group, shape, x_dtype):
    case = Case(*shape, form, group, x_dtype=x_dtype)
    case.check(case.run())


@pytest.mark.parametrize("hidden, inter", [(32, 32), (96, 64), (160, 224)])
@pytest.mark.parametrize("x_dtype", [BF16, F32], ids=str)
def test_groups_that_end_inside_a_vector(isa, hidden, inter, x_dtype):
    case = Case(4, hidden, inter, 6, 2, "int4", 32, x_dtype=x_dtype)
    case.check(case.run())


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (4, 33, 7, 3, 2), (5, 95, 41, 9, 3)])
def test_int8_of_odd_sizes(isa, shape):
    case = Case(*shape, "int8", 0, x_dtype=F32)
    case.check(case.run())


@each_form
def test_every_token_count(isa, form, group):
    for T in (0, 1, 2, 3, 4, 5, 7, 9, 13):
        case = Case(3, 128, 128, T, 1, form, group, ids=torch.full((T, 1), 1), seed=T)
        case.check(case.run())


@each_form
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_biases_of_every_dtype(isa, form, group, dtype, interleaved):
    case = Case(
        *(4, 128, 128, 9, 2, form, group),
        x_dtype=F32,
        dtype=dtype,
        bias=True,
        interleaved=interleaved,
        activation="swiglu_clamp",
        alpha=1.702,
        limit=1.0,
    )
    case.check(case.run())


@each_form
@pytest.mark.parametrize("x_dtype", [BF16, F32], ids=str)
def test_threads_and_neighbours_do_not_change_a_bit(isa, form, group, x_dtype):
    uneven = torch.cat([torch.zeros(40, 2), torch.arange(1, 21).reshape(10, 2)]).int()
    case = Case(21, 256, 128, 50, 2, form, group, x_dtype=x_dtype, ids=uneven)
    torch.ops.spac.set_cpu_threads(1)
    one = case.run()
    for threads in (2, 3):
        torch.ops.spac.set_cpu_threads(threads)
        assert torch.equal(one, case.run())
    x, ids, weights = case.x, case.ids, case.weights
    for t in (0, 7, 49):
        case.x, case.ids, case.weights = x[t : t + 1], ids[t : t + 1], weights[t : t + 1]
        assert torch.equal(case.run()[0], one[t])


@each_form
def test_wide_ranges_of_activations(isa, form, group):
    """Outliers in a token cost their neighbours of the same block (8 to 256 elements) bits."""
    case = Case(2, 256, 128, 4, 1, form, group)
    case.x[0, 5], case.x[1] = 3e4, case.x[1] * 1e-6
    case.x[2, 16:24], case.x[3, :128] = 0, 0
    exact, y = case.exact(), case.run()
    case.check(y)
    assert ((y - exact).norm(dim=1) <= 0.01 * exact.norm(dim=1)).all()


@each_form
def test_nan_comes_through_and_stays_in_its_token(isa, form, group):
    case = Case(2, 128, 128, 3, 1, form, group, ids=torch.zeros(3, 1, dtype=torch.int32))
    expected = case.run()
    case.x[1, 77] = float("nan")
    y = case.run()
    assert y[1].isnan().all() and torch.equal(y[::2], expected[::2])


@each_form
def test_invalid_pairs_add_nothing(isa, form, group):
    case = Case(6, 128, 128, 12, 4, form, group)
    case.ids[::2, 0], case.ids[1::3, 1], case.ids[:, 3] = -1, 6, 2_000_000_000
    case.check(case.run())
    case.ids.fill_(-1)
    assert torch.equal(case.run(), torch.zeros(12, 128))


GPU_TILES = {
    "tokens": FFNConfig("tokens", Tile(16, 16, 64, 4, 3), Tile(16, 32, 32, 4, 3)),
    "grouped": FFNConfig("grouped", Tile(32, 16, 64, 4, 3), Tile(32, 32, 32, 4, 3)),
}


@each_form
@pytest.mark.parametrize("path", GPU_TILES)
@pytest.mark.parametrize("dtype", [F16, F32], ids=str)  # bf16: the interpreter truncates
def test_gpu_kernels_read_the_same_bytes(path, form, group, dtype, device):
    """Against fp64, beside plain torch; what is read is stored into slots on the way."""
    interleaved = dtype == F32
    options = {"bias": True, "activation": "relu"} if interleaved else {}
    sizes = (4, 128, 128) if group == 128 else (4, 96, 64)
    case = Case(*sizes, 5, 2, form, group, x_dtype=dtype, dtype=dtype,
                interleaved=interleaved, **options)  # fmt: skip
    case.to(device)
    absent = case.ids.flatten()[0].item()
    slots = torch.zeros_like(case.memory)
    copy_to = slots.data_ptr() + case.layout.blob_bytes * torch.arange(4, device=device)
    used = case.ids.unique().long()
    table = replace(
        case.table, copy_to=torch.where(torch.arange(4, device=device) == absent, 0, copy_to)
    )
    y = gpu_expert_ffn(case.x, case.ids, case.weights, table, F32, GPU_TILES[path])
    case.check(y)
    wanted, stored = blob_views(case.memory, case.layout), blob_views(slots, case.layout)
    for e in used.tolist():
        for name in wanted:
            expected = torch.zeros_like(wanted[name][e]) if e == absent else wanted[name][e]
            assert torch.equal(stored[name][e], expected), (name, e)
