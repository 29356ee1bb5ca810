"""Receipts: which stored rows answer a job, so that a finished one is served without torch, models or data.

`STORE/receipts/<key>.json` names the files and rows of one evaluation. The key covers all that the answer depends on:
the resolved configuration, this package's own sources, the weights, the data files, the versions of the libraries, and
the code of a net, attack or certifier from outside. A receipt is believed only if every row it names is still there.

What a job left unfinished has a receipt too, so that the tables it stands in can be derived again; it is kept under a
name that no job asks for, as is that of a job without a key.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from robustbench_lite.evaluation.audit import SAMPLE, audit
from robustbench_lite.evaluation.files import put
from robustbench_lite.evaluation.flags import Flag, submitted_beats_attacks
from robustbench_lite.evaluation.handed import outsiders, with_submitted
from robustbench_lite.evaluation.precedence import each_once
from robustbench_lite.evaluation.records import SUBMITTED, to_frame
from robustbench_lite.evaluation.report import NotApplicable, Report
from robustbench_lite.evaluation.store import Store
from robustbench_lite.evaluation.unfinished import Unfinished

__all__ = ["Receipt", "all_of", "find", "keep", "receipt_of", "report_of"]

FORMAT = 4
_METHOD = ["kind", "method", "version", "threat", "eps"]
_MODEL = ["dataset", "fingerprint", "seed", "precision"]


@dataclass(frozen=True)
class Receipt:
    """The rows of one evaluation, and what no row shows.

    Attributes:
        config: of the job, resolved.
        defense: what the table calls the model.
        model: data set, fingerprint, seed and precision of the rows.
        methods: one a method and threat, in the table's order: its `_METHOD` columns, the `cells` that hold its rows,
            and the ranges [first, last] of their `indices`.
        samples: index, image hash and label of each sample: an index alone may have meant another image before.
        threats: name and eps of each threat.
        notes: the report's.
        not_applicable: the report's.
        unfinished: the report's, without tracebacks. A receipt with any serves no job: the next run goes on.
    """

    config: dict[str, Any]
    defense: str
    model: dict[str, Any]
    methods: list[dict[str, Any]]
    samples: list[list[Any]]
    threats: list[list[Any]]
    notes: list[dict[str, Any]]
    not_applicable: list[dict[str, Any]]
    unfinished: list[dict[str, Any]] = field(default_factory=list)
    format: int = FORMAT


def receipt_of(report: Report, config: Mapping[str, Any], store: Path) -> Receipt | None:
    """Return the receipt of a report whose rows are all in the store; None where they are not.

    Submitted rows are none of its own: whoever reads it finds those that are there by then.
    """
    own = report.records[(report.records["status"] != SUBMITTED).fillna(True).astype(bool)]
    first = own.iloc[0]
    model = {name: _plain(first[name]) for name in _MODEL}
    cells = _cells(store, model)
    methods = []
    for key, rows in own.groupby(_METHOD, sort=False, dropna=False):
        named = {name: _plain(value) for name, value in zip(_METHOD, key, strict=True)}
        methods.append(named | {"cells": cells.get(_key(named), []), "indices": _ranges(sorted(rows["index"]))})
    receipt = Receipt(
        dict(config),
        str(first["defense"]),
        model,
        methods,
        _samples(own),
        [[name, eps] for name, eps in report.threats],
        [asdict(note) for note in report.notes if note.id != submitted_beats_attacks.__name__],
        [asdict(part) for part in report.not_applicable],
        [asdict(replace(part, traceback="")) for part in report.unfinished],
    )
    served = report_of(receipt, store)
    same = served is not None and served.summary().to_csv() == report.summary().to_csv()
    return receipt if same else None


def report_of(receipt: Receipt, store: Path) -> Report | None:
    """Return the report that a receipt stands for, from the rows on the disk alone; None where one is missing.

    Raises:
        NewerSchemaError: a file was written by a newer version of this package.
    """
    opened, frames = Store(store), []
    samples = pd.DataFrame(receipt.samples, columns=SAMPLE)
    for method in receipt.methods:
        rows = _rows(opened, receipt, method, samples)
        if rows is None:
            return None
        frames.append(rows)
    threats = [(name, eps) for name, eps in receipt.threats]
    records = with_submitted(opened, pd.concat(frames, ignore_index=True), threats)
    found = audit(records)
    return Report(
        records,
        threats,
        [*(Flag(**note) for note in receipt.notes), *outsiders(records)],
        found.violations,
        found.findings,
        [NotApplicable(**part) for part in receipt.not_applicable],
        unfinished=[Unfinished(**part) for part in receipt.unfinished],
    )


def find(store: Path, key: str) -> Receipt | None:
    """Return the receipt of this key; None where there is none, or one that cannot be read."""
    try:
        content = json.loads(_path(store, key).read_text(encoding="utf-8"))
        return Receipt(**content) if content.get("format") == FORMAT else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None  # the evaluation runs, and writes a sound one


def all_of(store: Path) -> list[Receipt]:
    """Return the readable receipts of a store, the newest first."""
    paths = sorted((store / "receipts").glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    found = (find(store, path.stem) for path in paths)
    return [receipt for receipt in found if receipt is not None]


def keep(store: Path, key: str | None, receipt: Receipt) -> None:
    """Write a receipt, whole or not at all.

    Args:
        store: its folder.
        key: of the job; None where there is none.
        receipt: of a finished job, which is served by it, or of an unfinished one.

    Raises:
        OSError: it cannot be written.
    """
    data = json.dumps(asdict(receipt), separators=(",", ":")).encode()
    if key is None or receipt.unfinished:
        key = f"unserved-{hashlib.sha256(data).hexdigest()[:24]}"
    put(_path(store, key), data)


def _path(store: Path, key: str) -> Path:
    return store / "receipts" / f"{key}.json"


def _cells(store: Path, model: dict[str, Any]) -> dict[str, list[str]]:
    """Return the cells of the store that hold rows of this model on this data, by method."""
    found: dict[str, list[str]] = {}
    for head in Store(store).heads():
        if all(head.row[name] == value for name, value in model.items()):
            found.setdefault(_key({name: _plain(head.row[name]) for name in _METHOD}), []).append(head.name)
    return found


def _samples(records: pd.DataFrame) -> list[list[Any]]:
    named = records[SAMPLE].drop_duplicates().sort_values("index")
    return [[int(index), str(image), int(label)] for index, image, label in named.itertuples(index=False)]


def _rows(opened: Store, receipt: Receipt, method: dict[str, Any], samples: pd.DataFrame) -> pd.DataFrame | None:
    """Return the rows of one method, each once and in the order of their indices; None where one is missing."""
    indices = [index for low, high in method["indices"] for index in range(low, high + 1)]
    found = [opened.cell_records(name, indices) for name in method["cells"]]
    tables = [table for table in found if table is not None]
    if not tables:
        return None
    wanted = pd.MultiIndex.from_frame(samples[samples["index"].isin(indices)])
    rows = to_frame(each_once(pa.concat_tables(tables)))
    rows = rows[pd.MultiIndex.from_frame(rows[SAMPLE]).isin(wanted)].sort_values("index", ignore_index=True)
    rows["defense"] = pd.Series([receipt.defense] * len(rows), dtype=rows["defense"].dtype)
    return rows if list(rows["index"]) == indices else None


def _key(method: Mapping[str, Any]) -> str:
    return json.dumps([method[name] for name in _METHOD])


def _ranges(indices: list[int]) -> list[list[int]]:
    """Return sorted indices as ranges [first, last]: thousands of samples in a line."""
    found: list[list[int]] = []
    for index in map(int, indices):
        if found and index == found[-1][1] + 1:
            found[-1][1] = index
        else:
            found.append([index, index])
    return found


def _plain(value: Any) -> Any:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return None
    return value.item() if hasattr(value, "item") else value
