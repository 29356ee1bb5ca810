"""The table of a whole store, by scans that read the columns it needs, one model at a time.

It is the table that `summarize(store.records(), store.flags())` gives, without ever holding all records. What is out of
the ordinary (an index that stands for two images, a proof that an attack may have broken) is looked at by that very
code, on the records of the one model concerned.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from robustbench_lite.evaluation.audit import Contradiction, audit
from robustbench_lite.evaluation.lines import Line, Mask, Names, Scores, Seen, Summary, titled, to_summary
from robustbench_lite.evaluation.parts import Head
from robustbench_lite.evaluation.records import SUBMITTED
from robustbench_lite.evaluation.store import Store
from robustbench_lite.evaluation.summary import lines_of

__all__ = ["Scan", "scan"]

_SAMPLE = ["index", "sample_hash", "label"]
_COLUMNS = {
    "clean": ["correct", "prediction", "defense", "suspicion"],
    "attack": ["success", "distance", "status", "prediction", "correct", "suspicion"],
    "certifier": ["certified", "correct", "radius", "status", "certificate"],
}
_READERS = 4  # files read at a time: decoding needs no interpreter lock, and a network's file system answers slowly
_INVALID, _ABSTAIN = -2, -1  # of core.models, which needs torch


@dataclass(frozen=True, eq=False)
class Scan(Summary):
    """The table of a store.

    Attributes:
        violations: what the audit of all records objects to.
        warnings: what was found damaged or out of date.
    """

    violations: list[Contradiction]
    warnings: list[str]


@dataclass(frozen=True, eq=False)
class _Slab:
    """The columns of one cell, and the place of each row among the samples of its model."""

    head: Head
    table: pa.Table
    place: np.ndarray[Any, Any]

    def truth(self, name: str) -> Mask:
        return _truth(self.table[name])

    def is_(self, name: str, value: Any) -> Mask:
        """Say where a column has a value."""
        return _truth(pc.equal(self.table[name], value))

    def real(self, name: str) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = self.table[name].to_numpy()
        return found


class _IrregularError(Exception):
    """The records of a model need the code that looks at every column."""


def scan(store: Store | Path | str) -> Scan:
    """Return the table of a store, the outcomes behind its rows, and what the audit objects to.

    Raises:
        StoreError: there is no such store, or a newer version of this package has written it.
    """
    opened = store if isinstance(store, Store) else Store(store)
    models: dict[tuple[str, str], list[Head]] = {}
    order: dict[tuple[Any, ...], int] = {}
    for head in opened.heads():
        models.setdefault((head.row["dataset"], head.row["fingerprint"]), []).append(head)
        order.setdefault(_model(head.row), len(order))
    lines: list[Line] = []
    violations: list[Contradiction] = []
    known: dict[bytes, Names] = {}
    for heads in models.values():
        found, broken = _of_model(opened, heads, known)
        lines += found
        violations += broken
    lines.sort(key=lambda line: order[_model(line.key)])  # stable: threats keep their order
    invalid = {group for violation in violations for group in violation.groups}
    summary = to_summary(lines, opened.flags(), invalid)
    return Scan(summary.table, summary.outcomes, violations, list(opened.warnings))


def _model(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("dataset", "fingerprint", "seed", "precision"))


def _of_model(opened: Store, heads: list[Head], known: dict[bytes, Names]) -> tuple[list[Line], list[Contradiction]]:
    """Return the lines of one model on one data set, and the violations among its records."""
    try:
        slabs, names = _slabs(opened, heads, known)
        lines = [line for model in _by(slabs, _model) for line in _lines(model, names)]
        suspicious = _suspicious(slabs, len(names))
    except _IrregularError:
        lines, suspicious = [], True
    if not suspicious:
        return lines, []
    records = opened.records(cells=[head.name for head in heads])
    return lines or list(lines_of(records)), audit(records).violations


def _by(slabs: list[_Slab], key: Any) -> list[list[_Slab]]:
    groups: dict[Any, list[_Slab]] = {}
    for slab in slabs:
        groups.setdefault(key(slab.head.row), []).append(slab)
    return list(groups.values())


def _slabs(opened: Store, heads: list[Head], known: dict[bytes, Names]) -> tuple[list[_Slab], Names]:
    """Return the columns of these cells, and the samples that they are about, by index.

    Raises:
        _IrregularError: one index stands for two samples.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        tables = list(pool.map(lambda head: _table(opened, head), heads))
    samples = [tables[0].select(_SAMPLE)]
    like_first = [table.select(_SAMPLE).equals(samples[0]) for table in tables]
    samples += [table.select(_SAMPLE) for table, same in zip(tables, like_first, strict=True) if not same]
    once = pa.concat_tables(samples).group_by(_SAMPLE).aggregate([]).sort_by("index").combine_chunks()
    index = once["index"].to_numpy()
    if (index[1:] == index[:-1]).any():
        raise _IrregularError
    first = np.searchsorted(index, tables[0]["index"].to_numpy())
    places = [
        first if same else np.searchsorted(index, table["index"].to_numpy())
        for table, same in zip(tables, like_first, strict=True)
    ]
    slabs = [_Slab(*parts) for parts in zip(heads, tables, places, strict=True)]
    return slabs, _names(once, known)


def _table(opened: Store, head: Head) -> pa.Table:
    return opened.columns(head.name, [*_SAMPLE, *_COLUMNS[head.row["kind"]]]).combine_chunks()


def _names(samples: pa.Table, known: dict[bytes, Names]) -> Names:
    """Return the names of these samples; models that were asked about the same ones share them."""
    key = b"".join(bytes(part) for name in _SAMPLE for part in samples[name].chunk(0).buffers() if part is not None)
    if key not in known:
        known[key] = Names(*(samples[name].to_numpy() for name in _SAMPLE))
    return known[key]


def _lines(slabs: list[_Slab], names: Names) -> Iterator[Line]:
    """Yield a line for each threat that a model, seed and precision was judged under.

    Raises:
        _IrregularError: it has several cells of clean answers.
    """
    clean = [slab for slab in slabs if slab.head.row["kind"] == "clean"]
    if len(clean) > 1:
        raise _IrregularError
    if not clean:
        return
    asked = _mask(clean[0].place, len(names))
    threats = _by([slab for slab in slabs if slab is not clean[0]], lambda row: (row["threat"], row["eps"]))
    for part in threats or [[]]:
        touched = asked & _any([_mask(slab.place, len(names)) for slab in part], len(names)) if part else asked
        if touched.any():
            yield _line(clean[0], part, touched, names)


def _line(clean: _Slab, part: list[_Slab], touched: Mask, names: Names) -> Line:
    rows, place = np.flatnonzero(touched), np.cumsum(touched) - 1  # of each sample of the model: its place in the line
    own = names if touched.all() else Names(names.index[rows], names.sample_hash[rows], names.label[rows])
    correct = np.zeros(len(touched), dtype=bool)
    correct[clean.place] = clean.truth("correct")
    here = touched[clean.place]
    head = part[0].head.row if part else clean.head.row
    key = dict(zip(("dataset", "fingerprint", "seed", "precision"), _model(head), strict=True))
    key |= {"threat": head["threat"], "eps": head["eps"]}
    defense = clean.table["defense"].filter(pa.array(here))[-1].as_py()
    broken = bool((clean.is_("prediction", _INVALID) & here).any())
    broken |= any(s.is_("prediction", _INVALID).any() for s in part if s.head.row["kind"] == "attack")
    line = Line(key, defense, own, correct[rows], {}, broken)
    if clean.table["suspicion"].null_count < len(clean.table):
        accepted, line.scores = np.ones(len(touched), dtype=bool), np.full(len(rows), np.nan)
        accepted[clean.place] = ~clean.is_("prediction", _ABSTAIN)
        line.accepted = accepted[rows]
        line.scores[place[clean.place[here]]] = clean.real("suspicion")[here]
    for kind in ("attack", "certifier"):
        mine = [slab for slab in part if slab.head.row["kind"] == kind]
        titles = titled((slab.head.row["method"], slab.head.row["version"]) for slab in mine)
        for few in _by(mine, lambda row: (row["method"], row["version"])):
            head = few[0].head.row
            line.methods[titles[head["method"], head["version"]]] = _seen(kind, few, touched, place, len(rows))
    return line


def _seen(kind: str, slabs: list[_Slab], touched: Mask, place: np.ndarray[Any, Any], n: int) -> Seen:
    def where(masks: list[Mask]) -> Mask:
        mask = np.zeros(n, dtype=bool)
        for slab, chosen in zip(slabs, masks, strict=True):
            mine = slab.place[chosen]
            mask[place[mine[touched[mine]]]] = True
        return mask

    won = [slab.truth("success" if kind == "attack" else "certified") for slab in slabs]
    seen = Seen(kind, where([np.ones(len(slab.place), dtype=bool) for slab in slabs]), where(won))
    if kind == "attack":
        seen.submitted = all(slab.is_("status", SUBMITTED).all() for slab in slabs)
        seen.scores = _scores(slabs, touched, place, n)
        return seen
    kinds = {name: [slab.is_("certificate", name) for slab in slabs] for name in ("deterministic", "probabilistic")}
    seen.sure, seen.likely = (
        where([a & b for a, b in zip(won, masks, strict=True)]) if where(masks).any() else None
        for masks in kinds.values()
    )
    seen.late = where([slab.is_("status", "timeout") for slab in slabs])
    return seen


def _scores(slabs: list[_Slab], touched: Mask, place: np.ndarray[Any, Any], n: int) -> Scores | None:
    scores = np.full(n, np.nan)
    for slab in slabs:
        if slab.table["suspicion"].null_count < len(slab.table):
            mine = touched[slab.place] & ~slab.truth("correct")
            scores[place[slab.place[mine]]] = slab.real("suspicion")[mine]
    return None if np.isnan(scores).all() else scores


def _suspicious(slabs: list[_Slab], n: int) -> bool:
    """Say whether the audit may object: a claim was refuted, or a witness is no farther than a radius proven.

    A witness of any threat's name counts against the proofs of that name; a clean image that is wrong, against all.
    """
    near: dict[str | None, np.ndarray[Any, Any]] = {}
    wrong = np.full(n, np.inf)
    for slab in slabs:
        if slab.head.row["kind"] == "clean":
            wrong[slab.place[~slab.truth("correct")]] = 0.0
        elif slab.head.row["kind"] == "attack":
            if slab.is_("status", "refuted").any():
                return True
            won = slab.truth("success")
            distance = near.setdefault(slab.head.row["threat"], np.full(n, np.inf))
            np.minimum.at(distance, slab.place[won], np.nan_to_num(slab.real("distance")[won], nan=0.0))
    for slab in slabs:
        if slab.head.row["kind"] == "certifier":
            radius = slab.real("radius")
            claims = slab.truth("correct") & (slab.truth("certified") | (radius > 0))
            nearest = np.minimum(wrong, near.get(slab.head.row["threat"], np.inf))[slab.place]
            if (claims & (nearest <= radius)).any():
                return True
    return False


def _truth(column: Any) -> Mask:
    mask: Mask = pc.fill_null(column, False).to_numpy(zero_copy_only=False)
    return mask


def _mask(places: np.ndarray[Any, Any], n: int) -> Mask:
    mask = np.zeros(n, dtype=bool)
    mask[places] = True
    return mask


def _any(masks: list[Mask], n: int) -> Mask:
    union: Mask = np.logical_or.reduce([np.zeros(n, dtype=bool), *masks])
    return union
