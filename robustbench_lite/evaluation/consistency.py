"""What records must agree with, found without a model: their cell, each other, and the examples beside them.

Each function yields (index, reason) of records that do not hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from robustbench_lite.evaluation.audit import SAMPLE
from robustbench_lite.evaluation.examples import Examples
from robustbench_lite.evaluation.handed import Submitted
from robustbench_lite.evaluation.parts import Part
from robustbench_lite.evaluation.specs import build, canonical, title

__all__ = ["against_cell", "against_examples", "against_themselves"]

Reasons = Iterator[tuple[int, str]]

_NULL = {  # columns that say nothing about a kind of method
    "clean": ["threat", "eps", "success", "certified", "status", "distance", "radius", "certificate"],
    "attack": ["certified", "radius", "certificate", "confidence"],
    "certifier": ["success", "distance"],
}
_KEYS = ("dataset", "fingerprint", "kind", "version", "seed", "precision")


def against_cell(part: Part, rows: pd.DataFrame) -> Reasons:
    """Find rows that are not of the cell they lie in, and a cell that is not what its folder is called."""
    identity = part.identity
    name = hashlib.sha256(canonical(identity).encode()).hexdigest()[:24]
    if name != part.path.parent.name:
        yield -1, f"the folder should be called {name} after the identity in the file"
    expected: dict[str, Any] = {key: identity[key] for key in _KEYS}
    threat = build(identity["threat"])
    expected |= {"threat": None if threat is None else threat.name, "eps": None if threat is None else threat.size}
    method = _method(identity)
    expected |= {} if method is None else {"method": method}
    for column, value in expected.items():
        other = rows[column].notna() if value is None else (rows[column] != value).fillna(True)
        for index, found in zip(rows.loc[other, "index"], rows.loc[other, column], strict=True):
            yield int(index), f"{column} is {None if pd.isna(found) else found}, the cell's is {value}"


def against_themselves(kind: str, rows: pd.DataFrame) -> Reasons:
    """Find rows that contradict themselves, or stand there twice."""
    for index in rows.loc[rows.duplicated(SAMPLE), "index"]:
        yield int(index), "the record is there twice"
    for column in _NULL[kind]:
        for index in rows.loc[rows[column].notna(), "index"]:
            yield int(index), f"{column} says something about a record of kind {kind}"
    right = (rows["prediction"] == rows["label"]).fillna(False)
    for index in rows.loc[right != rows["correct"], "index"]:
        yield int(index), "correct does not follow from prediction and label"
    wrong = _contradictions(kind, rows)
    for reason, mask in wrong.items():
        for index in rows.loc[mask, "index"]:
            yield int(index), reason


def against_examples(rows: pd.DataFrame, examples: Examples | None) -> Reasons:
    """Find stored examples that no record counts as a success, or as a claim that was refuted."""
    if examples is None:
        return
    counted = rows.loc[rows["success"].fillna(False) | (rows["status"] == "refuted").fillna(False), "index"]
    known = set(rows["index"].tolist())
    for index in np.setdiff1d(examples.index, counted.to_numpy(dtype=np.int64)).tolist():
        yield (
            int(index),
            "it has a stored example, but its record counts none"
            if index in known
            else ("there is an example of it, but no record"),
        )


def _method(identity: dict[str, Any]) -> str | None:
    """Return what the method of a cell is called; None where it cannot be rebuilt (it holds a net, or is a user's)."""
    if identity["kind"] == "clean":
        return "clean"
    try:
        method = build(identity["method"])
    except (TypeError, ValueError):
        return None
    if isinstance(method, Submitted):
        return method.title
    queries = identity["settings"].get("max_queries")
    return title(method, max_queries=queries) if identity["kind"] == "attack" else title(method)


def _contradictions(kind: str, rows: pd.DataFrame) -> dict[str, Any]:
    if kind == "attack":
        won = rows["success"].fillna(False).astype(bool)
        finite = rows["distance"] < np.inf
        return {
            "a success at no distance": won & ~finite,
            "a distance without a success": ~won & finite,
            "a first success without a success": ~won & (rows["first_success"] != -1).fillna(False),
        }
    if kind == "certifier":
        proven = rows["certified"].fillna(False).astype(bool)
        sound = (
            (rows["status"] == "verified")
            & rows["correct"]
            & rows["certificate"].isin(["deterministic", "probabilistic"])
        )
        return {"certified, but not by what the record says": proven & ~sound.fillna(False)}
    return {}
