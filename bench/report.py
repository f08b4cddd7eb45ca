"""Result tables: Markdown for people, CSV and JSON for programs."""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spac.bench.machine import machine_block

FORMATS = ("md", "csv", "json")


class WrongResult(ValueError):
    """What was to be timed is not equal to the reference: the command exits with 1."""


@dataclass
class Table:
    """Rows of figures; `None` is a figure that was not measured and is shown as a dash."""

    columns: list[str]
    rows: list[list[Any]]
    title: str = ""
    notes: list[str] = field(default_factory=list)
    failed: bool = False  # a check did not hold: the command exits with 1

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.title!r}: {len(self.columns)} columns, row {row}")

    def to_md(self) -> str:
        """GitHub Markdown with title, machine and notes."""
        lines = [f"## {self.title}", ""] if self.title else []
        lines += ["| " + " | ".join(self.columns) + " |", "|" + " --- |" * len(self.columns)]
        lines += ["| " + " | ".join(map(format_cell, row)) + " |" for row in self.rows]
        return "\n".join([*lines, "", _machine(), "", *(f"- {n}" for n in self.notes)]).rstrip()

    def to_csv(self) -> str:
        """Header and rows with full precision."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([self.columns, *self.rows])
        return out.getvalue().rstrip("\n")

    def to_json(self) -> str:
        """Title, machine, notes, and one object per row."""
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        content = {"title": self.title, "machine": machine_block(), "notes": self.notes}
        return json.dumps(content | {"rows": rows}, indent=1, default=float)

    def emit(self, how: str, file: str | None) -> None:
        """Write in format `how` to `file`, or to standard output."""
        text = getattr(self, f"to_{how}")()
        if file is not None:
            Path(file).write_text(text + "\n")
        elif how == "md" and sys.stdout.isatty():
            self._print_rich()
        else:
            print(text)

    def _print_rich(self) -> None:
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable(*self.columns, title=self.title, title_justify="left")
        for row in self.rows:
            table.add_row(*map(format_cell, row))
        console = Console()
        console.print(table)
        console.print(_machine(), highlight=False)
        for note in self.notes:
            console.print(f"- {note}", highlight=False)


def _machine() -> str:
    return "Machine: " + ", ".join(f"{key} {value}" for key, value in machine_block().items())


def format_cell(value: Any) -> str:
    """Three significant digits for floats, a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)
