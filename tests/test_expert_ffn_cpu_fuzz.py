"""The C++ expert FFN on shapes, ids, token counts and absent experts that hypothesis thinks of."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spac import _C, reference  # noqa: F401  (_C loads the operators)
from spac.layout import ExpertLayout, ExpertTable
from spac.ops import expert_ffn_table


def supported(isa: str) -> bool:
    try:
        torch.ops.spac.set_cpu_isa(isa)
    except RuntimeError:
        return False
    finally:
        torch.ops.spac.set_cpu_isa("")
    return True


ISAS = [isa for isa in ("portable", "avx2", "avx512", "amx") if supported(isa)]
SIZES = st.integers(1, 140)
ODD_IDS = st.sampled_from([-(2**63), -(2**31), -1, 2**31 - 1, 2**31, 2**32, 2**63 - 1])


@pytest.fixture(autouse=True)
def _settings_are_put_back():
    yield
    torch.ops.spac.set_cpu_isa("")
    torch.ops.spac.set_cpu_threads(0)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_window(data):
    draw = data.draw
    E, H, inter = draw(st.integers(1, 9), "E"), draw(SIZES, "H"), draw(SIZES, "I")
    T, k = draw(st.integers(0, 48), "T"), draw(st.integers(0, 4), "k")
    dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
    dtype, x_dtype = draw(dtypes, "weights"), draw(dtypes, "x")
    # Few experts among many tokens, so that long lists for one expert are common.
    some = st.integers(0, draw(st.integers(0, E), "up to"))
    ids = draw(st.lists(some | ODD_IDS, min_size=T * k, max_size=T * k), "ids")
    absent = draw(st.sets(st.integers(0, E - 1)), "absent")
    layout = ExpertLayout(E, H, inter, dtype, interleaved=draw(st.booleans(), "interleaved"))

    g = torch.Generator().manual_seed(draw(st.integers(0, 99), "seed"))
    gate_up = (torch.randn(E, 2 * inter, H, generator=g) / H**0.5).to(dtype)
    down = (torch.randn(E, H, inter, generator=g) / inter**0.5).to(dtype)
    x = torch.randn(T, H, generator=g).to(x_dtype)
    weights = torch.rand(T, k, generator=g)
    pairs = torch.tensor(ids, dtype=torch.int64).reshape(T, k)
    table = ExpertTable.from_parameters(layout, gate_up, down)
    table.address[sorted(absent)] = 0

    torch.ops.spac.set_cpu_isa(draw(st.sampled_from(ISAS), "isa"))
    answers = []
    for threads in (1, draw(st.integers(2, 6), "threads")):
        torch.ops.spac.set_cpu_threads(threads)
        answers.append(expert_ffn_table(x, pairs, weights, table, backend="cpu"))
    assert torch.equal(*answers)

    reachable = torch.where(torch.isin(pairs, torch.tensor(sorted(absent))), -1, pairs)
    wide = (t.double() for t in (x, weights, gate_up, down))
    x64, weights64, gate_up64, down64 = wide
    exact = reference.expert_ffn(x64, reachable, weights64, gate_up64, down64, layout)
    tolerance = 2**-7 if torch.ops.spac.cpu_isa() == "amx" and dtype == torch.bfloat16 else 1e-6
    error = (answers[0] - exact).norm()
    # Terms may cancel: the scale is that of the sum without signs.
    sizes = reference.expert_ffn(
        x64.abs(), reachable, weights64, gate_up64.abs(), down64.abs(), layout
    )
    assert error <= tolerance * sizes.norm(), (error, sizes.norm())
