"""Sheets on the screen."""

from __future__ import annotations

import io
import re

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from robustbench_lite.report.sheet import NOT_APPLICABLE, TEXT_COLUMNS, Cell, Sheet

__all__ = ["to_screen"]

_STYLES = {"invalid": "bold red", "doubtful": "yellow", "reliable": "green", NOT_APPLICABLE: "dim"}
_IMPORTANT = ("robust", "certified")


def to_screen(sheet: Sheet, width: int | None = None) -> Table:
    """Return a rich table of accuracies in per cent, with their exact 95 % intervals below them.

    Args:
        sheet: what it says.
        width: columns of the screen. Where they do not suffice, the intervals of single attacks are left out, then all.
    """
    everything = set(sheet.headers)
    for intervals in (everything, {"clean", *_IMPORTANT}, set()):
        table = _table(sheet, intervals)
        if width is None or _natural_width(table) <= width:
            break
    return table


def _natural_width(table: Table) -> int:
    console = Console(width=10_000, file=io.StringIO())
    return console.measure(table).maximum


def _table(sheet: Sheet, intervals: set[str]) -> Table:
    title = Text(sheet.title, style="bold")
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, title_justify="left")
    for header in sheet.headers:
        justify = "left" if header in TEXT_COLUMNS else "right"
        table.add_column(_header(header), justify=justify, no_wrap=header != "flags", vertical="top")  # type: ignore[arg-type]
    for row in sheet.rows:
        table.add_row(*(_drawn(cell, header, intervals) for cell, header in zip(row, sheet.headers, strict=True)))
    return table


def _header(name: str) -> str:
    """Put each hyper-parameter of a method on a line of its own."""
    method, _, settings = name.partition("(")
    return "\n".join([method, *re.split(r", (?![^\[(]*[\])])", settings.removesuffix(")"))]) if settings else name


def _drawn(cell: Cell, header: str, intervals: set[str]) -> Text:
    style = _STYLES.get(cell.text, "bold" if header in _IMPORTANT else "")
    text = Text(cell.text, style=style)
    if cell.interval and header in intervals:
        text.append(f"\n{cell.interval}", style="not bold dim")
    return text
