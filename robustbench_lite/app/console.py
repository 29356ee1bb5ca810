"""The console: as wide as the screen, or wide enough for any table where the output is a file."""

from __future__ import annotations

import os
import sys

from rich.console import Console

__all__ = ["console"]

_WIDE = 240  # columns where the output is a file or a pipe: nothing is cut there


def console() -> Console:
    """Return a console on the standard output, as wide as the screen, or wide enough for any table."""
    known = sys.stdout.isatty() or os.environ.get("COLUMNS")
    return Console(file=sys.stdout, width=None if known else _WIDE, soft_wrap=False)
