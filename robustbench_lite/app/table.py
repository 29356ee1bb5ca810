"""`rbl table`: the tables of all that a store holds, ranked, without computing anything."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from robustbench_lite import zoo
from robustbench_lite.app.arguments import as_overrides
from robustbench_lite.app.console import console
from robustbench_lite.app.hydra_app import run
from robustbench_lite.app.jobs import plain_config
from robustbench_lite.app.screen import show_sheet
from robustbench_lite.evaluation.scan import scan
from robustbench_lite.report import load_published, sheets, write_cards, write_tables

__all__ = ["job", "main"]


def main(arguments: Sequence[str]) -> int:
    """Run `rbl table [STORE]`."""
    return run(job, "table", as_overrides(arguments, ["store"], ["store", "published", "out", "cards"]))


def job(config: DictConfig) -> int:
    """Show the tables, write them where asked, and return the exit status: 1 if a row is invalid.

    Raises:
        StoreError: there is no such store.
        ValueError: the store holds no records, or the published rows are none.
    """
    plain = plain_config(config)
    published = load_published(plain["published"]) if plain["published"] else None
    found = scan(plain["store"])
    if len(found.table) == 0:
        raise ValueError(f"there are no records in {plain['store']}")
    screen, written = console(), []
    for sheet in sheets([found], published):
        show_sheet(sheet)
        written += write_tables(sheet, Path(plain["out"])) if plain["out"] else []
        written += write_cards(sheet, Path(plain["cards"]), _about(found.table["defense"])) if plain["cards"] else []
    for violation in found.violations:
        screen.print(f"invalid: {violation.evidence}", style="bold red", highlight=False, markup=False)
    for warning in found.warnings:
        screen.print(f"store: {warning}", style="yellow", highlight=False, markup=False)
    for path in written:
        screen.print(f"written: {path}", style="dim", highlight=False, soft_wrap=True, markup=False)
    return int(bool((found.table["verdict"] == "invalid").any()))


def _about(defenses: Any) -> dict[str, dict[str, Any]]:
    """Return what the zoo's cards say of defenses, in the fields of a model_info file."""
    found = {}
    for name in set(defenses) & set(zoo.names()):
        card = zoo.card(name)
        source = str(card["source"])
        paper = re.search(r"arXiv:(\d{4}\.\d{4,5})", source)
        about = {"venue": source, "architecture": str(card["model"].get("_target_", "")).rpartition(".")[2]}
        found[name] = about | ({"link": f"https://arxiv.org/abs/{paper[1]}"} if paper else {})
    return found
