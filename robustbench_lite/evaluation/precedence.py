"""Which of several rows about one sample is read: one order by what they say, whatever their files are called.

Two machines may compute a row at the same time, and a randomised model, or another processor, may give two that differ.
The row that says less for the model goes first:

- of an attack, a success before a failure, and the nearer one of two; among failures, a claim that was refuted;
- of a certifier, what is not certified before what is, a counterexample before a doubt, the smaller radius;
- of clean answers, a wrong one before a right one, one that is not finite or abstains before a class.

What still ties is ordered by its other columns, so that any two rows that differ have an order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from robustbench_lite.evaluation.cells import sample_keys
from robustbench_lite.evaluation.records import SCHEMA

__all__ = ["best_first", "chosen", "each_once", "repeated"]

_LARGEST_FIRST = "success"
_FIRST = (_LARGEST_FIRST, "distance", "certified", "status", "radius", "correct", "prediction", "margin")
_STATUS = pa.array(["falsified", "refuted", "timeout", "abstained", "unknown", "verified", "submitted"])


def best_first(rows: pa.Table) -> np.ndarray[Any, Any]:
    """Return the positions of records, all columns of them, by who goes first; int64 (N,)."""
    names = dict.fromkeys((*_FIRST, *SCHEMA.names))
    columns = pa.table({name: _sortable(name, rows[name]) for name in names})
    keys = [(name, "descending" if name == _LARGEST_FIRST else "ascending") for name in names]
    found: np.ndarray[Any, Any] = pc.sort_indices(columns, sort_keys=keys).to_numpy().astype(np.int64)
    return found  # nulls and NaN last


def chosen(rows: pa.Table) -> list[int]:
    """Return the positions of the records that are read, one for each sample, in their order."""
    keys = sample_keys(rows)
    if len(set(keys)) == len(keys):
        return list(range(len(keys)))
    first: dict[tuple[int, str, int], int] = {}
    for place in best_first(rows).tolist():
        first.setdefault(keys[place], place)
    return sorted(first.values())


def each_once(rows: pa.Table) -> pa.Table:
    """Return records, all columns of them, with one row for each sample."""
    places = chosen(rows)
    return rows if len(places) == len(rows) else rows.take(pa.array(places, pa.int64()))


def repeated(rows: pa.Table) -> bool:
    """Say whether a sample has several rows; their names are enough to tell."""
    keys = sample_keys(rows)
    return len(set(keys)) < len(keys)


def _sortable(name: str, column: Any) -> Any:
    if name == "status":
        return pc.index_in(column, value_set=_STATUS)
    return column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column
