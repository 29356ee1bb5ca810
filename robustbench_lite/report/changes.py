"""The sheet of what changed between two stores."""

from __future__ import annotations

from typing import Any

import pandas as pd

from robustbench_lite.report.sheet import NOT_APPLICABLE, Cell, Sheet, number, p_text

__all__ = ["changes_sheet"]

_HEADERS = [
    "dataset", "defense", "threat", "change", "samples", "robust", "lost", "gained", "p", "certified", "verdict",
    "rows removed", "rows added",
]  # fmt: skip


def changes_sheet(changes: pd.DataFrame, before: str, after: str) -> Sheet:
    """Return the sheet of a table of changes (`evaluation/changes.py`): before and after in one cell, with an arrow.

    Args:
        changes: the table.
        before: what the first store is called.
        after: what the second is called.
    """
    varying = [name for name in ("seed", "precision") if changes[name].nunique(dropna=False) > 1]
    rows = [[Cell(text) for text in _texts(row, varying)] for row in changes.to_dict("records")]
    return Sheet(f"{before} -> {after}", "changes", _HEADERS, rows, changes)


def _texts(row: dict[Any, Any], varying: list[str]) -> list[str]:
    settings = ", ".join(f"{name} {row[name]}" for name in varying)
    counts = [NOT_APPLICABLE if pd.isna(row[name]) else f"{int(row[name])}" for name in ("common", "lost", "gained")]
    return [
        str(row["dataset"]),
        f"{row['defense']} ({settings})" if settings else str(row["defense"]),
        "-" if row["threat"] is None else f"{row['threat']} {number(float(row['eps']))}",
        f"{row['change']}, significantly" if row["significant"] else str(row["change"]),
        counts[0],
        _arrow(row, "robust", _per_cent),
        *counts[1:],
        NOT_APPLICABLE if pd.isna(row["p"]) else p_text(row["p"]),
        _arrow(row, "certified", _per_cent),
        _arrow(row, "verdict", str),
        f"{row['rows_removed']}",
        f"{row['rows_added']}",
    ]


def _arrow(row: dict[Any, Any], name: str, text: Any) -> str:
    one, two = (row[f"{name}_{when}"] for when in ("before", "after"))
    before, after = (NOT_APPLICABLE if pd.isna(value) else text(value) for value in (one, two))
    return before if before == after else f"{before} -> {after}"


def _per_cent(share: float) -> str:
    return f"{100 * share:.1f}"
