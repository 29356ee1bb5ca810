"""Stored tables, derived again: each file in `STORE/tables` must be what the records say.

A row of a table comes of one evaluation, whose receipt names its rows in the store. The receipts that give the rows of
a table are found by their figures, the whole table is made from them once more, and compared text by text.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from robustbench_lite.app import receipts
from robustbench_lite.evaluation.lines import Summary
from robustbench_lite.report import FORMATS, sheets, table_of

__all__ = ["Objection", "check_tables"]

Objection = tuple[str, str]
"""A file, relative to the store, and what is wrong with it."""

_KEY = ("dataset", "fingerprint", "threat", "eps", "seed", "precision", "n")
_RANKS = ("rank", "p_above")


def check_tables(store: Path) -> Iterator[Objection]:
    """Yield every file of tables that does not follow from the records, and evaluations whose records are not there."""
    folder = store / "tables"
    stems = sorted({path.with_suffix("") for path in folder.glob("*") if path.suffix.removeprefix(".") in FORMATS})
    derived: list[Summary] = []
    for receipt in receipts.all_of(store):
        report = receipts.report_of(receipt, store)
        if report is None:
            yield "receipts", f"records of {receipt.defense} on {receipt.model['dataset']} are no longer all there"
        else:
            derived.append(table_of(report))
    for stem in stems:
        for ending, reason in _objections(stem, derived):
            yield (Path("tables") / f"{stem.name}.{ending}").as_posix(), reason


def _objections(stem: Path, derived: list[Summary]) -> Iterator[tuple[str, str]]:
    path = stem.with_name(f"{stem.name}.csv")
    if not path.exists():
        yield "csv", "it is missing beside the others: which rows they show cannot be told"
        return
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    parts: list[Summary] = []
    for row in rows:
        found = _source(row, derived)
        if found is None:
            yield "csv", f"the row of {row.get('defense')} does not follow from the records of any evaluation"
            return
        parts.append(found)
    sheet = next((sheet for sheet in sheets(parts) if sheet.slug == stem.name), None)
    for ending, text in FORMATS.items():
        path = stem.with_name(f"{stem.name}.{ending}")
        if path.exists() and (sheet is None or path.read_text(encoding="utf-8") != text(sheet)):
            yield ending, "it is not what the same evaluations give now"


def _source(row: dict[str, str], derived: list[Summary]) -> Summary | None:
    """Return the summary, cut to one row, that a row of a CSV file shows; None where there is none."""
    for summary in derived:
        texts = list(csv.DictReader(io.StringIO(summary.table.to_csv(index=False, lineterminator="\n"))))
        for place, own in enumerate(texts):
            if all(own.get(name) == row.get(name) for name in _KEY) and _same(own, row):
                table = summary.table.iloc[[place]].reindex(columns=[name for name in row if name not in _RANKS])
                return Summary(table, [summary.outcomes[place]])  # with the columns of the whole, in their order
    return None


def _same(own: dict[str, str], row: dict[str, str]) -> bool:
    """Say whether two rows agree: every figure of the one stands in the other, which has no further one."""
    return all((own.get(name) or "") == (row.get(name) or "") for name in {*own, *row} - set(_RANKS))
