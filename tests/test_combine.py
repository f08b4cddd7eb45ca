import pytest
import torch

from spac import reference
from spac.kernels.combine import combine


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("shape", [(3, 50), (1, 1), (5, 1030), (0, 8)], ids=str)
def test_is_the_reference(shape, count, dtype, device):
    torch.manual_seed(0)
    partials = [torch.randn(shape, device=device) for _ in range(count)]
    ours, truth = combine(partials, dtype), reference.combine(partials, dtype)
    assert ours.dtype == dtype
    if device == "cpu" and dtype == torch.bfloat16:  # the interpreter truncates
        assert torch.allclose(ours.float(), truth.float(), rtol=2**-7)
    else:
        assert torch.equal(ours, truth)


def test_strided_partials(device):
    wide = torch.randn(4, 9, device=device)
    assert torch.equal(
        combine([wide[:, :5], wide[:, 4:]], torch.float32), wide[:, :5] + wide[:, 4:]
    )


def test_shapes_are_checked(device):
    with pytest.raises(ValueError, match=r"all of one shape, got \[\[2, 3\], \[3, 2\]\]"):
        combine([torch.zeros(2, 3, device=device), torch.zeros(3, 2, device=device)], torch.float32)
    with pytest.raises(ValueError, match="at least one"):
        combine([], torch.float32)
