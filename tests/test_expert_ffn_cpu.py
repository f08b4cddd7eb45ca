"""The C++ expert FFN against `spac.reference` in fp64, on every ISA that this CPU can run."""

import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

from spac import _C, reference  # noqa: F401  (_C loads the operators)
from spac.layout import ExpertLayout, ExpertTable

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def supported_isas() -> list[str]:
    out = ["portable"]
    for isa in ("avx2", "avx512", "amx"):
        try:
            torch.ops.spac.set_cpu_isa(isa)
            out.append(isa)
        except RuntimeError:
            pass
    torch.ops.spac.set_cpu_isa("")
    return out


ISAS = supported_isas()


@pytest.fixture(params=ISAS)
def isa(request):
    torch.ops.spac.set_cpu_isa(request.param)
    yield request.param
    torch.ops.spac.set_cpu_isa("")
    torch.ops.spac.set_cpu_threads(0)


class Case:
    """Random weights and routing of one layer; `run` calls the operator, `exact` is in fp64."""

    def __init__(self, E, H, inter, T, k, dtype, *, x_dtype=None, ids=None, seed=0, **options):
        g = torch.Generator().manual_seed(seed)
        self.layout = ExpertLayout(E, H, inter, dtype, **options)
        self.gate_up = (torch.randn(E, 2 * inter, H, generator=g) / H**0.5).to(dtype)
        self.down = (torch.randn(E, H, inter, generator=g) / inter**0.5).to(dtype)
        self.bias = [None, None]
        if self.layout.bias:
            shapes = (E, 2 * inter), (E, H)
            self.bias = [torch.randn(s, generator=g).to(dtype) for s in shapes]
        self.x = torch.randn(T, H, generator=g).to(x_dtype or dtype)
        random = torch.rand(T, E, generator=g).argsort(-1)[:, :k].to(torch.int32)
        self.ids = random if ids is None else ids
        self.weights = torch.rand(T, self.ids.shape[1], generator=g)

    def table(self) -> ExpertTable:
        return ExpertTable.from_parameters(self.layout, self.gate_up, self.down, *self.bias)

    def run(self, table: ExpertTable | None = None, **replace) -> torch.Tensor:
        t, lay = table or self.table(), self.layout
        args = {"x": self.x, "ids": self.ids, "weights": self.weights, "address": t.address}
        args |= {"dtype": lay.dtype, "intermediate": lay.intermediate}
        strides = ("gate_stride", "up_offset", "down_offset", "down_skew", "down_stride")
        args |= {name: getattr(t, name) for name in strides} | {"bias": lay.bias}
        biases = ("gate_up_bias_offset", "gate_up_bias_skew", "down_bias_offset", "down_bias_skew")
        biases += ("bias_stride", "bias_up_offset")
        args |= {name: getattr(t, name) for name in biases}
        args |= {n: getattr(lay, n) for n in ("activation", "alpha", "limit")}
        return torch.ops.spac.expert_ffn_cpu(**(args | replace))

    def _reference(self, dtype: torch.dtype) -> torch.Tensor:
        tensors = [self.x, self.weights, self.gate_up, self.down, *self.bias]
        x, weights, gate_up, down, *bias = (None if v is None else v.to(dtype) for v in tensors)
        return reference.expert_ffn(x, self.ids, weights, gate_up, down, self.layout, *bias)

    def exact(self) -> torch.Tensor:
        return self._reference(torch.float64)

    def plain_torch(self) -> torch.Tensor:
        """Per-expert matmuls in the dtype of the weights, as the eager models do."""
        lay, dtype = self.layout, self.layout.dtype
        y = torch.zeros(self.x.shape, dtype=dtype)
        for e in range(lay.num_experts):
            token, choice = torch.where(self.ids == e)
            if token.numel() == 0:
                continue
            gub, db = (None if b is None else b[e] for b in self.bias)
            h = F.linear(self.x[token].to(dtype), self.gate_up[e], gub)
            gate, up = (h[:, ::2], h[:, 1::2]) if lay.interleaved else h.chunk(2, dim=-1)
            out = F.linear(reference.activate(gate, up, lay), self.down[e], db)
            y.index_add_(0, token, out * self.weights[token, choice, None].to(dtype))
        return y

    def check(self, y: torch.Tensor) -> None:
        """At most twice the error of plain torch (DESIGN section 6), both against fp64."""
        exact = self.exact()
        assert y.dtype == F32 and y.shape == self.x.shape
        error = (y - exact).norm().item()
        plain = (self.plain_torch() - exact).norm().item()
        # One fp32 rounding of the result is granted: with very short sums torch may be exact.
        assert error <= 2 * plain + 2**-24 * exact.norm().item(), (error, plain)


DTYPES = [BF16, F16, F32]
SHAPES = [  # E, H, I, T, k
    (1, 1, 1, 1, 1),
    (4, 33, 7, 3, 2),
    (8, 64, 48, 1, 8),
    (5, 95, 41, 9, 3),
    (16, 256, 96, 31, 4),
    (3, 520, 100, 70, 2),  # blocks of K, panels and several token blocks
    (2, 1056, 530, 17, 2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(isa, shape, dtype):
    case = Case(*shape, dtype)
    case.check(case.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_token_count(isa, dtype):
    """One expert takes all tokens: every tile width and every split into blocks."""
    for T in range(71):
        ids = torch.full((T, 1), 1)
        case = Case(3, 72, 29, T, 1, dtype, ids=ids, seed=T)
        case.check(case.run())


@pytest.mark.parametrize("x_dtype", DTYPES, ids=lambda d: f"x={d}")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: f"w={d}")
def test_mixed_dtypes(isa, dtype, x_dtype):
    case = Case(6, 75, 37, 11, 2, dtype, x_dtype=x_dtype)
    case.check(case.run())


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "swiglu_clamp"])
def test_layouts(isa, activation, interleaved, bias):
    case = Case(
        *(4, 80, 50, 19, 2, F32),
        activation=activation,
        alpha=1.702,
        limit=1.0,
        interleaved=interleaved,
        bias=bias,
    )
    case.check(case.run())


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swiglu_clamp"])
def test_activation_accuracy(isa, activation):
    """H = I = 1 and unit weights make the output the activation itself, from -90 to 90."""
    gate = torch.linspace(-90, 90, 4001)[:, None]
    case = Case(
        *(1, 1, 1, 4001, 1, F32),
        ids=torch.zeros(4001, 1, dtype=torch.int32),
        activation=activation,
        alpha=1.702,
        limit=50.0,
    )
    case.gate_up.fill_(1)
    case.down.fill_(1)
    case.weights.fill_(1)
    case.x = gate
    expected = case.exact()
    # silu is one exp away from its input: relative. The others round the argument of exp first.
    scale = expected.abs() if activation == "silu" else gate.abs() * (gate.abs() + 1)
    assert ((case.run() - expected).abs() <= 1e-6 * scale + 1e-34).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_floats(isa, dtype):
    """Subnormal weights count, NaN and infinity come through."""
    case = Case(1, 40, 24, 1, 1, dtype, ids=torch.zeros(1, 1, dtype=torch.int32))
    tiny = torch.finfo(dtype).smallest_normal
    case.gate_up.copy_(torch.randn(case.gate_up.shape) * tiny / 4)
    case.x.fill_(1 / tiny if dtype != F16 else 60000.0)
    case.check(case.run())
    case.x[0, 3] = float("nan")
    assert case.run().isnan().all()
    case.x[0, 3] = 1.0
    case.down[0, 5, 2] = float("inf")
    y = case.run()
    assert not y[0, 5].isfinite() and y[0, :5].isfinite().all() and y[0, 6:].isfinite().all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_a_bit(isa, dtype, threads):
    uneven = torch.cat([torch.zeros(40, 2), torch.arange(1, 21).reshape(10, 2)]).int()
    case = Case(21, 200, 90, 50, 2, dtype, ids=uneven)
    torch.ops.spac.set_cpu_threads(1)
    one = case.run()
    torch.ops.spac.set_cpu_threads(threads)
    for _ in range(5):
        assert torch.equal(one, case.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours_do_not_change_a_bit(isa, dtype):
    """A token gets the same answer alone and among others: verify windows agree with decoding.

    Matrix tiles begin at eight tokens of an expert, so there the answers of windows agree.
    """
    case = Case(4, 1100, 72, 40, 4, dtype)
    together = case.run()
    few = 9 if (isa, dtype) == ("amx", BF16) else 1
    for t in (0, 7, 40 - few):
        window = slice(t, t + few)
        alone = case.run(x=case.x[window], ids=case.ids[window], weights=case.weights[window])
        assert torch.equal(alone, together[window])


def test_invalid_pairs_add_nothing(isa):
    case = Case(6, 48, 20, 12, 4, BF16)
    case.ids[::2, 0], case.ids[1::3, 1], case.ids[:, 3] = -1, 6, 2_000_000_000
    case.check(case.run())
    table = case.table()
    table.address[2] = 0
    case.ids[case.ids == 2] = -5
    assert torch.equal(case.run(), case.run(table))
    assert torch.equal(case.run(), case.run(ids=case.ids.long()))
    case.ids.fill_(-1)
    assert torch.equal(case.run(), torch.zeros(12, 48))
    absent = torch.zeros_like(table.address)
    assert torch.equal(case.run(address=absent), torch.zeros(12, 48))


def test_partial_tables_add_up(isa):
    case = Case(8, 64, 40, 9, 4, F32)
    whole, left, right = case.run(), case.table(), case.table()
    left.address[::2], right.address[1::2] = 0, 0
    torch.testing.assert_close(case.run(left) + case.run(right), whole)


def test_repeated_expert_in_one_token(isa):
    case = Case(4, 32, 16, 5, 3, F32, ids=torch.ones(5, 3, dtype=torch.int32))
    case.check(case.run())


def test_empty(isa):
    case = Case(3, 40, 24, 0, 2, BF16)
    assert case.run().shape == (0, 40)
    case = Case(3, 40, 24, 4, 0, BF16)
    assert torch.equal(case.run(), torch.zeros(4, 40))


def test_more_pairs_than_taken_at_once(isa):
    case = Case(3, 24, 10, 2100, 2, F32)
    case.check(case.run())
    case.ids.fill_(2)
    case.check(case.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blobs(isa, dtype):
    """The host store: one blob per expert, in any order, with biases and interleaved rows."""
    case = Case(5, 50, 30, 8, 2, dtype, bias=True, interleaved=True, activation="relu")
    lay = case.layout
    slots = torch.full((7 * lay.blob_bytes,), 0xFF, dtype=torch.uint8)
    where = torch.tensor([4, 0, 6, 2, 1])
    parts = dict(zip(lay.sections(), (case.gate_up, case.down, *case.bias), strict=True))
    for e, slot in enumerate(where.tolist()):
        for name, (offset, shape) in lay.sections().items():
            size = torch.Size(shape).numel() * dtype.itemsize
            begin = slot * lay.blob_bytes + offset
            slots[begin : begin + size].view(dtype).view(shape).copy_(parts[name][e])
    table = ExpertTable.from_blobs(lay, slots.data_ptr() + where * lay.blob_bytes, owner=slots)
    assert torch.equal(case.run(table), case.run())
    case.check(case.run(table))


def test_strided_views(isa):
    """Rows with gaps between them, filled with NaN, and unaligned starts."""
    case = Case(3, 37, 21, 6, 2, BF16)
    wide_gate_up = torch.full((3, 50, 61), float("nan"), dtype=BF16)
    wide_down = torch.full((3, 40, 33), float("nan"), dtype=BF16)
    expected = case.run()
    gate_up, down = wide_gate_up[:, 3:45, 5:42], wide_down[:, 2:39, 1:22]
    gate_up.copy_(case.gate_up)
    down.copy_(case.down)
    case.gate_up, case.down = gate_up, down
    assert torch.equal(case.run(), expected)


def test_reads_nothing_past_the_weights(isa):
    """The last row ends where a page without access begins."""
    import ctypes
    import mmap

    libc = ctypes.CDLL(None, use_errno=True)
    page = mmap.PAGESIZE
    for dtype in DTYPES:
        case = Case(1, 53, 27, 3, 1, dtype, ids=torch.zeros(3, 1, dtype=torch.int32))
        expected = case.run()
        size = (case.gate_up.numel() + case.down.numel()) * dtype.itemsize
        pages = -(-size // page)
        memory = mmap.mmap(-1, (pages + 1) * page)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        fence = ctypes.c_void_p(begin + pages * page)
        assert libc.mprotect(fence, ctypes.c_size_t(page), 0) == 0
        start = pages * page - size
        flat = torch.frombuffer(memory, dtype=dtype, count=size // dtype.itemsize, offset=start)
        flat.copy_(torch.cat([case.gate_up.flatten(), case.down.flatten()]))
        split = case.gate_up.numel()
        case.gate_up = flat[:split].view_as(case.gate_up)
        case.down = flat[split:].view_as(case.down)
        assert torch.equal(case.run(), expected)
        libc.mprotect(fence, ctypes.c_size_t(page), 3)


def test_concurrent_callers():
    """Two Python threads at once get the answers that each gets alone; the GIL is not held."""
    cases = [Case(8, 128, 64, 20, 2, BF16, seed=s) for s in range(2)]
    expected = [c.run() for c in cases]
    wrong = []

    def work(i: int) -> None:
        for _ in range(50):
            if not torch.equal(cases[i].run(), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not wrong and not any(t.is_alive() for t in threads)


def test_fork_and_exit():
    """A forked child computes with a pool of its own, and both processes end."""
    code = """
import os, torch
from spac import _C
from spac.ops import expert_ffn
torch.ops.spac.set_cpu_threads(2)
torch.manual_seed(0)
args = torch.randn(4, 32), torch.tensor([[0, 1]] * 4), torch.rand(4, 2)
args += torch.randn(2, 24, 32), torch.randn(2, 32, 12)
y = expert_ffn(*args, backend="cpu")
pid = os.fork()
same = torch.equal(y, expert_ffn(*args, backend="cpu"))
if pid == 0:
    os._exit(0 if same else 1)
status = os.waitpid(pid, 0)[1]
print(same, os.waitstatus_to_exitcode(status))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert out.returncode == 0 and out.stdout.strip() == "True 0", out.stderr


@pytest.mark.parametrize("isa_name", [*ISAS, "neon"])
def test_spac_cpu_variable(isa_name):
    code = "import torch; from spac import _C; print(torch.ops.spac.cpu_isa())"
    env = os.environ | {"SPAC_CPU": isa_name}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env
    )
    if isa_name in ISAS:
        assert out.stdout.strip() == isa_name
    else:
        assert "SPAC_CPU: expected portable, avx2, avx512 or amx, got 'neon'" in out.stderr


def test_isa_choice():
    assert torch.ops.spac.cpu_isa() == os.environ.get("SPAC_CPU", ISAS[-1])
    with pytest.raises(RuntimeError, match="set_cpu_isa: expected portable, avx2, avx512 or amx"):
        torch.ops.spac.set_cpu_isa("neon")
    with pytest.raises(RuntimeError, match="set_cpu_threads: expected 1..1024"):
        torch.ops.spac.set_cpu_threads(-1)


@pytest.mark.parametrize(
    "replace, message",
    [
        ({"x": torch.zeros(4, 32).T}, "x: expected a contiguous CPU tensor of 2"),
        ({"x": torch.zeros(4, 32, dtype=torch.float64)}, "x: expected bfloat16, float16 or"),
        ({"ids": torch.zeros(3, 2, dtype=torch.int32)}, r"expected \[4, k\] both, got \[3, 2\]"),
        ({"ids": torch.zeros(4, 2)}, "ids: expected int32 or int64"),
        ({"weights": torch.zeros(4, 2, dtype=BF16)}, "weights: expected float32"),
        ({"address": torch.zeros(3, dtype=torch.int32)}, "address: expected int64"),
        ({"dtype": torch.int8}, "dtype: expected bfloat16, float16 or float32"),
        ({"activation": "tanh"}, "activation: expected silu, gelu, .* got 'tanh'"),
        ({"intermediate": 0}, "expected hidden and intermediate in 1"),
    ],
    ids=str,
)
def test_errors(replace, message):
    with pytest.raises(RuntimeError, match=message):
        Case(3, 32, 16, 4, 2, F32).run(**replace)
