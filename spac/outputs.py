"""What a command writes, and what it says when that, or anything else, goes wrong."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PIPE_CLOSED = 141  # as a shell reports SIGPIPE


def check_output(option: str, path: str | None) -> None:
    """ValueError unless `path` is None or a file that can be written: before the work begins."""
    if path is None:
        return
    file, reason = Path(path), ""
    if file.is_dir():
        reason = "it is a folder"
    elif not file.parent.is_dir():
        reason = f"no folder {file.parent}"
    elif not os.access(file if file.exists() else file.parent, os.W_OK):
        reason = "no permission"
    if reason:
        raise ValueError(f"{option}: cannot write {path}: {reason}")


def one_line(error: BaseException) -> str:
    """What an error says, on one line; its name if it says nothing."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def pipe_closed() -> int:
    """The exit code when whoever reads standard output has gone (`| head`); the rest of the output
    is dropped, so that Python does not complain of it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return PIPE_CLOSED
