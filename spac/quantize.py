"""Expert weights in 8 or 4 bits: symmetric, read as they lie by the CPU's and the GPU's kernels.

int8: q in -127..127, one fp32 scale per output row, s = max|w| / 127;
|w - s q| <= s / 2 (times 1 + 2^-16, since s is rounded).
int4: q in -8..7, one fp16 scale per `group` weights along K, s = max|w| / 7 rounded so that
|w - s q| <= s / 2. Two weights are one byte: q + 8 of weight 2 i in the low half of byte i, of
weight 2 i + 1 in the high half.

For weights with a normal distribution this is an error, relative to their rms, of about 0.8 % in
int8 (rows of 2048), 9 % in int4 with groups of 32 and 11 % with groups of 128.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spac.layout import ExpertLayout

_LEVELS = {"int8": 127, "int4": 7}
_WEIGHTS = ("gate_up", "down")


def quantize_rows(w: Tensor, form: str, group: int = 0) -> tuple[Tensor, Tensor]:
    """(q, scale) of w [..., N, K] float.

    int8: q int8 [..., N, K], scale fp32 [..., N, 1]. int4: q uint8 [..., N, K / 2], scale fp16
    [..., N, K / group]. Raises ValueError for weights that are not finite or too large for fp16
    scales.
    """
    if form not in _LEVELS:
        raise ValueError(f"form: expected int8 or int4, got {form!r}")
    if form == "int4" and (group < 1 or w.shape[-1] % group or group % 2):
        raise ValueError(f"w: expected rows in groups of {group}, got {w.shape[-1]} weights")
    w = w.float()
    parts = w if form == "int8" else w.unflatten(-1, (-1, group))
    most = parts.abs().amax(-1)
    scale = most / _LEVELS[form]
    if form == "int4":
        half = scale.half()
        # fp16 may round a scale down so far that the largest weight is out of reach.
        short = half.float() * 7.5 < most
        scale = torch.where(short, (half.view(torch.int16) + 1).view(torch.float16), half)
    if not bool(scale.isfinite().all()):
        raise ValueError(f"w: expected finite weights that {form} can hold, got up to {most.max()}")
    step = scale.float()[..., None]
    q = torch.where(step > 0, parts / step, 0.0).round()
    if form == "int8":
        return q.to(torch.int8), scale[..., None]
    q = (q.clamp(-8, 7) + 8).to(torch.uint8).flatten(-2)
    return q[..., ::2] | q[..., 1::2] << 4, scale


def dequantize_rows(
    q: Tensor, scale: Tensor, form: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """s q in `dtype`, [..., N, K]; the inverse of `quantize_rows` as far as there is one."""
    if form == "int8":
        return q.to(dtype) * scale.to(dtype)
    pairs = torch.stack([q & 15, q >> 4], dim=-1).flatten(-2).to(dtype) - 8
    parts = pairs.unflatten(-1, (scale.shape[-1], -1))
    return (parts * scale[..., None].to(dtype)).flatten(-2)


def quantize(weights: dict[str, Tensor], layout: ExpertLayout) -> dict[str, Tensor]:
    """Every section of the quantised `layout`, for one expert or several ([..., *shape]).

    weights: gate_up [..., 2I, H] and down [..., H, I] row-major, and the biases if the layout has
    them, in any float dtype and in the row order of the layout.
    """
    out = {}
    for name in _WEIGHTS:
        q, scale = quantize_rows(weights[name], layout.form, layout.group)
        out[name], out[f"{name}_scale"] = q, scale
    for name in ("gate_up_bias", "down_bias") if layout.bias else ():
        out[name] = weights[name].to(layout.dtype)
    return {name: out[name] for name in layout.sections()}


def dequantize(
    sections: dict[str, Tensor], layout: ExpertLayout, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The weights that the quantised `sections` stand for, by name, in `dtype`."""
    out = {
        name: dequantize_rows(sections[name], sections[f"{name}_scale"], layout.form, dtype)
        for name in _WEIGHTS
    }
    return out | {n: t.to(dtype) for n, t in sections.items() if n.endswith("bias")}
