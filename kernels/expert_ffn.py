"""The expert FFN over the address table, for any number of tokens.

"tokens" (at most 16 tokens): `kernels/tokens.py`, two launches.
"grouped" (any number): `kernels/grouped.py`, on pairs sorted by expert.
"descriptors": the same on Hopper, `kernels/grouped_tma.py`, if the table's addresses are slots.
The same inputs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spac.kernels.common import check_pairs
from spac.kernels.config import FFNConfig, device_of, select_config
from spac.kernels.grouped import grouped_down, grouped_gate_up
from spac.kernels.grouped_tma import gate_up_tma, has_descriptors, rows_tma
from spac.kernels.plan import Plan, make_plan
from spac.kernels.pull import wait
from spac.kernels.sum_pairs import sum_pairs
from spac.kernels.tokens import expert_ffn_tokens


def expert_ffn(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    table: Any,
    out_dtype: torch.dtype | None = None,
    config: FFNConfig | None = None,
) -> Tensor:
    """y[t] = sum_j weights[t, j] * ffn(ids[t, j], x[t]) over the experts in `table`.

    x [T, H] in the layout's dtype, ids [T, k] int32 or int64, weights [T, k] float. Returns
    [T, H] in `out_dtype` (default x.dtype). Ids outside 0..E-1 and experts at address 0 add
    nothing and read nothing. `config` overrides `select_config`.
    """
    check_pairs(x, ids, weights, table)
    T, H = x.shape
    y = torch.empty(T, H, dtype=out_dtype or x.dtype, device=x.device)
    if ids.numel() == 0:
        return y.zero_()
    x = x if x.stride(1) == 1 else x.contiguous()
    ids, weights = ids.contiguous(), weights.contiguous()
    config = config or choose(x, ids, table)
    if config.path == "tokens":
        expert_ffn_tokens(x, ids, weights, table, y, config)
    else:
        if table.places is not None:
            wait(table.places)
        _grouped(x, ids, weights, table, y, config)
    return y


def choose(x: Tensor, ids: Tensor, table: Any, path: str | None = None) -> FFNConfig:
    """`select_config` for x [T, H] and ids [T, k]; path "grouped" for what has gradients."""
    T, K = ids.shape
    return select_config(T, K, table.layout, device_of(x.device), path, has_descriptors(table))


def _gate_up(
    x: Tensor, plan: Plan, table: Any, config: FFNConfig, h: Tensor, pre: Tensor | None = None
) -> None:
    run = gate_up_tma if config.path == "descriptors" else grouped_gate_up
    run(x, plan, table, config.gate_up, h, pre)


def _grouped(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    table: Any,
    y: Tensor,
    config: FFNConfig,
    pre: Tensor | None = None,
) -> Plan:
    plan = make_plan(ids, table, config.gate_up.block_m)
    h = x.new_empty(ids.numel(), table.layout.intermediate)
    _gate_up(x, plan, table, config, h, pre)
    # fp32 partial results as long as they stay in L2; beyond, traffic counts more. Large tiles of
    # fp32 would not fit shared memory beside the pipeline.
    small = ids.numel() * x.shape[1] <= 2**22 and config.path != "descriptors"
    out = torch.empty(
        ids.numel(), x.shape[1], dtype=torch.float32 if small else x.dtype, device=x.device
    )
    if config.path == "descriptors":
        rows_tma(h, weights, plan, table.slots.down, config.down, out)
    else:
        grouped_down(h, weights, plan, table, config.down, out)
    sum_pairs(out, ids, table.address, y)
    return plan


def save_hidden(x: Tensor, ids: Tensor, table: Any, config: FFNConfig) -> tuple[Plan, Tensor]:
    """What a backward pass needs of the forward: the plan, and gate and up [P, 2I] by row."""
    plan = make_plan(ids.contiguous(), table, config.gate_up.block_m)
    h = x.new_empty(ids.numel(), table.layout.intermediate)
    pre = x.new_empty(ids.numel(), 2 * table.layout.intermediate)
    _gate_up(x, plan, table, config, h, pre)
    return plan, pre


def expert_ffn_train(
    x: Tensor, ids: Tensor, weights: Tensor, table: Any, config: FFNConfig | None = None
) -> tuple[Tensor, tuple[Plan, Tensor]]:
    """y [T, H] in x.dtype as from `expert_ffn`, and what `expert_ffn_backward` saves by having."""
    check_pairs(x, ids, weights, table)
    (T, H), K = x.shape, ids.shape[1]
    config = config or choose(x, ids, table, "grouped")
    ids, weights = ids.contiguous(), weights.contiguous()
    y = torch.empty(T, H, dtype=x.dtype, device=x.device)
    pre = x.new_empty(T * K, 2 * table.layout.intermediate)
    plan = _grouped(x.contiguous(), ids, weights, table, y, config, pre)
    return y, (plan, pre)
