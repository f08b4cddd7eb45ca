"""The table after a generation, for people."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

from spac.config import format_bytes
from spac.speculative import GenerationResult


def print_summary(
    stats: dict[str, Any],
    timed: dict[str, Any] | None,
    result: GenerationResult,
    plain: GenerationResult | None,
) -> None:
    """Print the figures of `result`, what was done in it (`spac.status.between`; None: nothing is
    offloaded) and `spac.stats` after it, beside a run without draft."""
    table = Table(title="spac", show_header=False, title_justify="left")
    for name, value in _rows(stats, timed, result, plain):
        table.add_row(name, value)
    Console().print(table)


def _rows(
    stats: dict[str, Any],
    timed: dict[str, Any] | None,
    result: GenerationResult,
    plain: GenerationResult | None,
) -> list[tuple[str, str]]:
    drafted = result.drafted or plain is not None
    rows = [(f"tokens/s{', with speculation' * bool(drafted)}", f"{result.tokens_per_second:.1f}")]
    if plain is not None:
        speed, base = result.tokens_per_second, plain.tokens_per_second
        ratio = f" (ratio {speed / base:.2f})" if base else ""
        rows.append(("tokens/s, without", f"{base:.1f}{ratio}"))
        same = result.sequences.tolist() == plain.sequences.tolist()
        rows.append(("same text without", "yes" if same else "no"))
    rows += [
        ("time to first token", f"{result.prefill_seconds * 1e3:.0f} ms"),
        ("accepted drafts", f"{result.accepted} of {result.drafted} ({result.acceptance:.0%})"),
        ("tokens per target forward", f"{result.tokens_per_forward:.2f}"),
        ("draft length", _draft_lengths(result)),
    ]
    if result.capture_seconds:
        rows.append(("CUDA graphs", f"captured in {result.capture_seconds:.2g} s, not counted"))
    if timed is None:
        return rows + [("experts", "all on the CPU, no GPU budget")]
    budget, balancer = stats["budget"], stats["balancer"]
    moved = timed["bytes_moved"] / max(result.new_tokens, 1)
    experts = sum(1 for _ in stats["coverage_by_layer"])
    rows += [
        ("GPU budget", f"{format_bytes(budget['total'])}, {budget['slots']} expert slots"),
        ("coverage", f"{timed['coverage']:.0%} of pairs ran on resident experts"),
        ("moved per token", f"{format_bytes(moved)} ({timed['loads']} loads in {experts} layers)"),
        ("balancer", f"{balancer['solved']} plans, {balancer['failed'] + balancer['late']} failed"),
        ("thresholds by layer", " ".join(map(str, balancer["tau"]))),
        ("slot quotas by layer", " ".join(f"{q:.0f}" for q in balancer["slots"])),
    ]
    return rows


def _draft_lengths(result: GenerationResult) -> str:
    common = Counter(result.gammas).most_common(3)
    used = ", ".join(f"{gamma} in {count} windows" for gamma, count in common)
    return f"{used}; {result.draft_length_reason}" if used else result.draft_length_reason
