"""`python -m spac plan`: predicted speed by GPU budget, from a model's config alone."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from spac.config import SpacConfig, format_bytes, parse_bytes
from spac.outputs import check_output
from spac.plotting import pyplot

COLUMNS = ["GPU budget", "slots", "experts on GPU", "coverage", "tokens/s", "gamma"]
COLUMNS += [
    "tokens/s, gamma 0",
    "TTFT s",
    "step ms",
    "draft",
    "dense",
    "hand-over",
    "GPU experts",
    "missing",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--model", required=True, metavar="PATH", help="folder with a config.json")
    parser.add_argument(
        "--gpu-budget", required=True, nargs="+", metavar="SIZE", help="one or more"
    )
    parser.add_argument("--draft", default="none", metavar="PATH|ngram|none")
    parser.add_argument(
        "--acceptance", type=float, help="of a drafted token; default 0.7, ngram 0.4"
    )
    parser.add_argument(
        "--profile", metavar="NAME|FILE", help="machine; default: this one, timed in under 30 s"
    )
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="for the TTFT")
    parser.add_argument("--max-length", type=int, default=SpacConfig.max_length, metavar="N")
    parser.add_argument(
        "--plot", metavar="FILE", help="curves of tokens/s and TTFT; needs matplotlib"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table; ValueError in one line for whatever is wrong."""
    from spac.experts import find_experts
    from spac.forecast import calibrated, config_model, forecast, machine_costs, step_bytes
    from spac.machine import find_machine

    sizes = [parse_bytes(size) for size in args.gpu_budget]
    acceptance = args.acceptance
    if acceptance is None:
        acceptance = {"none": 0.0, "ngram": 0.4}.get(args.draft, 0.7)
    if not 0 <= acceptance <= 1:
        raise ValueError(f"--acceptance: expected 0 to 1, got {acceptance}")
    if args.prompt_tokens < 1:
        raise ValueError(f"--prompt-tokens: must be at least 1, got {args.prompt_tokens}")
    check_output("--plot", args.plot)
    if args.plot:
        pyplot()  # or fail before the machine is timed
    if args.draft == "none" and args.acceptance:
        raise ValueError("--acceptance: needs a --draft")
    machine = None if args.profile is None else find_machine(args.profile)
    model = config_model(args.model)
    if not find_experts(model):
        raise ValueError(f"{args.model}: {type(model).__name__} has no Mixture-of-Experts layers")
    costs = calibrated(model) if machine is None else machine_costs(model, machine)
    draft, draft_token = None, 0.0
    if args.draft not in ("none", "ngram"):
        draft = config_model(args.draft)
        read = step_bytes(draft) * costs.gpu_expert / costs.expert_bytes
        draft_token = read if machine is None else max(machine.draft_token, read)
    settings = SpacConfig(max_length=args.max_length)
    options: dict[str, Any] = {"draft": draft, "draft_token": draft_token}
    options |= {"acceptance": acceptance, "prompt": args.prompt_tokens, "settings": settings}
    found = [forecast(model, size, costs, **options) for size in sorted(sizes)]
    table = Table(title=f"{type(model).__name__} on {costs.name}", title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for f in found:
        s = f.best
        table.add_row(
            format_bytes(f.budget.total), str(f.budget.slots), f"{f.share:.0%}",
            f"{f.coverage:.0%}", _figure(s.tokens_per_second), str(s.gamma),
            _figure(f.without.tokens_per_second), f"{f.ttft:.2g}", _figure(s.seconds * 1e3),
            *(f"{_figure(1e3 * t)} ms" for t in (s.draft, s.dense, s.handoff, s.gpu, s.missing)),
        )  # fmt: skip
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    source = "timed just now, dense part derived" if machine is None else machine.source
    if machine is None and not torch.cuda.is_available():
        source += "; there is no GPU here, so the CPU's kernels stand for it as well: --profile"
        source += " predicts for a machine with one"
    console.print(f"Costs: {source}.", highlight=False)
    console.print(
        f"Assumed: draft acceptance {acceptance:g}, routing reuse of the development traces; "
        "missing experts are shared by CPU and link, beside those on the GPU.",
        highlight=False,
    )
    if args.plot:
        _plot(args.plot, found)
    return 0


def _figure(value: float) -> str:
    """Three significant digits, all digits of what is larger."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _plot(path: str, found: list[Any]) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    budgets = [f.budget.total / 2**30 for f in found]
    axes[0].plot(budgets, [f.best.tokens_per_second for f in found], marker="o", label="best gamma")
    axes[0].plot(budgets, [f.without.tokens_per_second for f in found], marker="o", label="gamma 0")
    axes[1].plot(budgets, [f.ttft for f in found], marker="o")
    for axis, what in zip(axes, ("tokens/s", "seconds to the first token"), strict=True):
        axis.set(xlabel="GPU budget, GiB", ylabel=what, ylim=(0, None))
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
