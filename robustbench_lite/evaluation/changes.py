"""What changed between two stores: rows, verdicts, and accuracies on the same samples.

A line is a defense by its name, on a data set, under a threat, with a seed and a precision; its model may have changed.
Accuracies are compared on the samples that both stores have, by McNemar's exact test, corrected by Holm for the number
of lines (`compare`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from robustbench_lite.evaluation.cells import sample_keys
from robustbench_lite.evaluation.compare import ALPHA, compare, holm, mcnemar
from robustbench_lite.evaluation.lines import Outcomes
from robustbench_lite.evaluation.scan import scan
from robustbench_lite.evaluation.store import Store

__all__ = ["COLUMNS", "changes"]

_LINE = ["dataset", "defense", "threat", "eps", "seed", "precision"]
_SAMPLE = ["index", "sample_hash", "label"]
_FIGURES = ["verdict", "certified", "fingerprint", "n"]
COLUMNS = (
    *_LINE, "change", "common", "robust_before", "robust_after", "lost", "gained", "p", "significant",
    *(f"{name}_{when}" for name in _FIGURES for when in ("before", "after")), "rows_removed", "rows_added",
)  # fmt: skip
"""Of the table of changes: the line; "only before", "only after", "changed" or "same"; how many samples both have, the
shares of them that stood, how many stand no more and how many anew; the corrected p-value, NaN where nothing is shared;
verdict, certified share, model and number of samples of each; records that only one store has."""


@dataclass(frozen=True, eq=False)
class _Side:
    """One store: its table, the outcomes behind its rows, and the cells behind each."""

    store: Store
    table: pd.DataFrame
    outcomes: list[Outcomes | None]
    cells: dict[tuple[Any, ...], set[str]]


def changes(before: Store | Path | str, after: Store | Path | str) -> pd.DataFrame:
    """Return the table of changes (`COLUMNS`), in the order of the stores.

    Raises:
        StoreError: there is no such store, or a newer version of this package has written it.
    """
    one, two = _side(before), _side(after)
    rows = [_row(one, two, *pair) for pair in _pairs(one.table, two.table)]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    tested = table["p"].notna()
    table.loc[tested, "p"] = holm(table.loc[tested, "p"].to_numpy())
    return table.assign(significant=table["p"] <= ALPHA)


def _side(store: Store | Path | str) -> _Side:
    opened = store if isinstance(store, Store) else Store(store)
    found = scan(opened)
    cells: dict[tuple[Any, ...], set[str]] = {}
    for head in opened.heads():
        threat = (head.row["threat"], head.row["eps"])
        cells.setdefault((*(head.row[n] for n in ("dataset", "fingerprint", "seed", "precision")), *threat), set()).add(
            head.name
        )
    return _Side(opened, found.table, found.outcomes, cells)


def _pairs(before: pd.DataFrame, after: pd.DataFrame) -> Iterator[tuple[int | None, int | None]]:
    """Yield the positions of the rows that are about one line: those of one model first, then as they come."""
    lines: dict[tuple[Any, ...], tuple[list[int], list[int]]] = {}
    for side, table in enumerate((before, after)):
        for place, row in enumerate(table.to_dict("records")):
            lines.setdefault(_plain(row[name] for name in _LINE), ([], []))[side].append(place)
    for left, right in lines.values():
        same = [(i, j) for i in left for j in right if before["fingerprint"].iloc[i] == after["fingerprint"].iloc[j]]
        yield from same
        rest = [i for i in left if i not in {a for a, _ in same}], [j for j in right if j not in {b for _, b in same}]
        for place in range(max(map(len, rest))):
            i, j = (side[place] if place < len(side) else None for side in rest)
            yield i, j


def _row(one: _Side, two: _Side, i: int | None, j: int | None) -> dict[str, Any]:
    rows = [None if place is None else side.table.iloc[place] for side, place in ((one, i), (two, j))]
    known = next(row for row in rows if row is not None)
    out: dict[str, Any] = {name: known[name] for name in _LINE}
    for when, row in zip(("before", "after"), rows, strict=True):
        out |= {f"{name}_{when}": None if row is None else row[name] for name in _FIGURES}
    removed, added = _rows_apart(one, rows[0], two, rows[1])
    out |= {"rows_removed": removed, "rows_added": added, "p": np.nan} | _tested(one, i, two, j)
    if None in (i, j):
        return out | {"change": "only after" if i is None else "only before"}
    moved = any(not _equal(rows[0][name], rows[1][name]) for name in ("verdict", "certified"))  # type: ignore[index]
    changed = moved or out.get("lost") or out.get("gained") or removed or added
    return out | {"change": "changed" if changed else "same"}


def _tested(one: _Side, i: int | None, two: _Side, j: int | None) -> dict[str, Any]:
    first, second = None if i is None else one.outcomes[i], None if j is None else two.outcomes[j]
    if first is None or second is None:
        return {}
    found = compare([first, second])
    common, lost, gained = int(found.common[0, 1]), int(found.only[0, 1]), int(found.only[1, 0])
    if common == 0:
        return {"common": 0}
    both = int(found.both[0, 1])
    shares = {"robust_before": (both + lost) / common, "robust_after": (both + gained) / common}
    return {"common": common, "lost": lost, "gained": gained, "p": float(mcnemar(lost, gained))} | shares


def _rows_apart(one: _Side, left: Any, two: _Side, right: Any) -> tuple[int, int]:
    """Return how many records about a line only the one store has, and only the other."""
    mine, theirs = _cells(one, left), _cells(two, right)
    removed = sum(_count(one.store, name) for name in mine - theirs)
    added = sum(_count(two.store, name) for name in theirs - mine)
    for name in mine & theirs:
        tables = [side.store.columns(name, _SAMPLE) for side in (one, two)]
        if not tables[0].equals(tables[1]):
            before, after = (set(sample_keys(table)) for table in tables)
            removed, added = removed + len(before - after), added + len(after - before)
    return removed, added


def _cells(side: _Side, row: Any) -> set[str]:
    """Return the names of the cells of a line, its model's clean answers among them."""
    if row is None:
        return set()
    model = tuple(row[name] for name in ("dataset", "fingerprint", "seed", "precision"))
    own = side.cells.get((*model, *_plain((row["threat"], row["eps"]))), set())
    return own | side.cells.get((*model, None, None), set())


def _count(store: Store, name: str) -> int:
    return len(store.columns(name, ["index"]))


def _plain(values: Any) -> tuple[Any, ...]:
    return tuple(None if pd.isna(value) else value for value in values)


def _equal(one: Any, two: Any) -> bool:
    return bool(one == two) or (pd.isna(one) and pd.isna(two))
