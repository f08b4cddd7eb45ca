"""Progress of long work: a bar on a terminal, one line on standard error otherwise."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], description: str, show: bool = True) -> Iterator[T]:
    """Iterate over `items`; with `show` False without a word."""
    if show and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(items, description, console=Console(stderr=True), transient=True)
        return
    if show:
        print(f"{description} ...", file=sys.stderr, flush=True)
    yield from items
