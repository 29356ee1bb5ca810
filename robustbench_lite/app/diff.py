"""`rbl diff`: what changed between two stores, and whether it is significant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from robustbench_lite.app.arguments import as_overrides
from robustbench_lite.app.console import console
from robustbench_lite.app.hydra_app import run
from robustbench_lite.app.jobs import plain_config
from robustbench_lite.app.screen import show_sheet
from robustbench_lite.core.files import write_atomically
from robustbench_lite.evaluation.changes import changes
from robustbench_lite.evaluation.store import Store
from robustbench_lite.report import FORMATS, changes_sheet

__all__ = ["job", "main"]

_FILES = {"csv": "csv", "json": "json", "markdown": "md", "latex": "tex"}  # of the options, what writes them


def main(arguments: Sequence[str]) -> int:
    """Run `rbl diff STORE_A STORE_B`."""
    return run(job, "diff", as_overrides(arguments, ["before", "after"], ["before", "after", *_FILES]))


def job(config: DictConfig) -> int:
    """Show what changed, write it where asked, and return the exit status 0.

    Raises:
        StoreError: there is no such store.
        OSError: a file cannot be written.
    """
    plain = plain_config(config)
    stores = [Store(plain[name]) for name in ("before", "after")]
    sheet = changes_sheet(changes(*stores), str(plain["before"]), str(plain["after"]))
    show_sheet(sheet)
    screen = console()
    for store in stores:
        for warning in store.warnings:
            screen.print(f"{store.root}: {warning}", style="yellow", highlight=False, markup=False)
    for option, ending in _FILES.items():
        if plain[option]:
            write_atomically(Path(plain[option]), FORMATS[ending](sheet).encode())
            screen.print(f"written: {plain[option]}", style="dim", highlight=False, soft_wrap=True)
    return 0
