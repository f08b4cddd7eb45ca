"""What an attached model did: coverage, bytes moved, decisions, the last generation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from spac.attachment import Attachment, attachment
from spac.engine import COUNTERS, Engine


def stats(model: PreTrainedModel) -> dict[str, Any]:
    """Counters since attach, as plain numbers (JSON-ready).

    `coverage` is the share of the decode pairs that ran on resident experts, `bytes_copied` what
    the copy thread moved into slots since the first fill, `streamed_bytes` what the GPU read of
    experts in host memory (`streamed_experts` of them in decode windows, the others in prefill);
    `kept_experts` of these stayed in a slot, which counts among the `loads`. A
    copy is late if its expert had pairs while it was under way, wasted if it was evicted unused.
    Raises ValueError if the model is not attached.
    """
    state = attachment(model)
    if state is None:
        raise ValueError("stats: this model is not attached; call spac.attach(model) first")
    out: dict[str, Any] = {"offloaded": state.engine is not None}
    if state.budget is not None:
        out["budget"] = asdict(state.budget)
    if state.engine is not None:
        out |= _engine_stats(state.engine)
    if state.last_generation is not None:
        out["generation"] = _generation_stats(state)
    return out


def between(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What one attachment with an engine did from one `stats` to another: `coverage`, `loads` and
    `bytes_moved`, copied into slots or read over the link."""
    change = {
        name: after[name] - before[name]
        for name in ("pairs", "resident_pairs", "loads", "bytes_copied", "streamed_bytes")
    }
    return {
        "coverage": _share(change["resident_pairs"], change["pairs"]),
        "loads": change["loads"],
        "bytes_moved": change["bytes_copied"] + change["streamed_bytes"],
    }


def prometheus(model: PreTrainedModel) -> str:
    """`stats` as Prometheus text: one gauge per number, lists by layer."""
    lines: list[str] = []
    for name, value in _numbers("spac", stats(model)):
        lines.append(f"# TYPE {name} gauge")
        values = value if isinstance(value, list) else [value]
        label = '{{layer="{}"}}' if isinstance(value, list) else ""
        lines += [f"{name}{label.format(i)} {float(v):g}" for i, v in enumerate(values)]
    return "\n".join(lines) + "\n"


def _numbers(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(f"{prefix}_{name}", value)
        elif isinstance(value, (int, float)) or name in ("coverage_by_layer", "tau", "slots"):
            yield f"{prefix}_{name}", value


def _engine_stats(engine: Engine) -> dict[str, Any]:
    counters = engine.counters.cpu().numpy()
    totals = dict(zip(COUNTERS, counters.sum(axis=0).tolist(), strict=True))
    pool, control = engine.pool, engine.control
    balancer = control.balancer.balancer
    filled = pool.slot_bytes * min(pool.num_slots, pool.held.size)
    return {
        "windows": engine.windows,
        **totals,
        "coverage": _share(totals["resident_pairs"], totals["pairs"]),
        "coverage_by_layer": [_share(c[1], c[0]) for c in counters.tolist()],
        "loads": pool.loads,
        "evictions": pool.evictions,
        "kept_experts": pool.kept,
        "resident": int((pool.slot_of >= 0).sum()),
        "late_copies": engine.copier.late,
        "wasted_copies": engine.copier.wasted,
        "bytes_copied": max(engine.copier.bytes_copied - filled, 0),
        "streamed_experts": int(engine.streamed.sum()),
        "streamed_bytes": engine.streamed_bytes,
        "prefill_tokens": engine.prefill_tokens,
        "cpu_seconds": engine.cpu_seconds,
        "waited_seconds": engine.waited_seconds,
        "balancer": {
            "solved": balancer.solved,
            "failed": balancer.failed,
            "late": balancer.late,
            "error": balancer.error,
            "tau": control.estimator.tau.tolist(),
            "slots": [round(float(q), 1) for q in control.estimator.quota],
            "objective_seconds": None if control.plan is None else control.plan.objective,
        },
        "bounds": control.bounds.tolist(),
    }


def _generation_stats(state: Attachment) -> dict[str, Any]:
    result = state.last_generation
    names = (
        "new_tokens",
        "target_forwards",
        "drafted",
        "accepted",
        "acceptance",
        "tokens_per_forward",
        "tokens_per_second",
        "prefill_seconds",
        "decode_seconds",
        "capture_seconds",
    )
    out = {name: getattr(result, name) for name in names}
    return out | {"draft_length_reason": result.draft_length_reason, "gammas": result.gammas}


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
