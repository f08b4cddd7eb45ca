"""Types of argparse options: bad values are refused before anything runs."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A count of at least 1."""
    return at_least(1, text)


def not_negative(text: str) -> int:
    """A count that may be 0."""
    return at_least(0, text)


def fraction(text: str) -> float:
    """A number of 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected 0 to 1, got {text}")
    return value


def at_least(least: int, text: str) -> int:
    """The whole number in `text`, no less than `least`."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value
