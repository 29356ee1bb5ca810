"""Versions of a data set: which samples were evaluated together.

An index may come to stand for another image or label: the data file was corrected, or other images go by the same name.
Rows are addressed by content, so none is ever taken for another; but a table over both would mix two data sets. Hence
each evaluation leaves the list of its samples in the store,

    STORE/slices/<fingerprint>-<dataset>-<content>.json

and where a model has rows about two contents of one index, `newest` says which rows go together: those of the slice
evaluated last, and of each older slice that agrees with it wherever both have an index. Slices without a common index
always agree: nothing tells two parts of one data set from parts of two.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from robustbench_lite.evaluation.cells import SampleNames
from robustbench_lite.evaluation.files import put

__all__ = ["SAMPLE_COLUMNS", "ambiguous", "keep_slice", "newest", "rows_of", "slice_of"]

SAMPLE_COLUMNS = ("dataset", "fingerprint", "index", "sample_hash", "label")

Content = tuple[str, int]


def keep_slice(root: Path, fingerprint: str, dataset: str, samples: SampleNames) -> str:
    """Keep the list of the samples that a model is evaluated on, and return the name of its file, without the end.

    Nothing is written if it is the last one kept.

    Raises:
        OSError: it cannot be written.
    """
    lists = [samples.indices.tolist(), samples.hashes, samples.targets.tolist()]
    rows = sorted(zip(*lists, strict=True))
    content = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
    stem = f"{_stem(fingerprint, dataset)}{content}"
    kept = _slices(root, fingerprint, dataset)
    if not kept or kept[0][1] != rows:
        data = json.dumps({"written": time.time_ns(), "samples": rows}).encode()
        put(root / "slices" / f"{stem}.json", data)
    return stem


def slice_of(path: Path) -> tuple[int, list[tuple[int, str, int]]]:
    """Return when a slice was last evaluated, in nanoseconds, and its samples: index, image hash, label.

    Raises:
        OSError, ValueError, KeyError, TypeError: it cannot be read, or is damaged.
    """
    kept = json.loads(path.read_text(encoding="utf-8"))
    return int(kept["written"]), [(int(i), str(h), int(y)) for i, h, y in kept["samples"]]


def newest(root: Path, fingerprint: str, dataset: str) -> dict[int, Content]:
    """Return the content, (sample hash, label), of each index in the newest version of the data a model has seen."""
    whole: dict[int, Content] = {}
    for _, rows in _slices(root, fingerprint, dataset):
        part = {index: (name, label) for index, name, label in rows}
        if all(whole.get(index, content) == content for index, content in part.items()):
            whole |= part
    return whole


def ambiguous(rows: pa.Table) -> list[tuple[str, str]]:
    """Return (dataset, fingerprint) of each model that has rows about two contents of one index."""
    contents = rows.select(SAMPLE_COLUMNS).group_by(list(SAMPLE_COLUMNS)).aggregate([])
    counts = contents.group_by(["dataset", "fingerprint", "index"]).aggregate([("label", "count")])
    twice = counts.filter(pc.greater(counts.column("label_count"), 1))
    return list(dict.fromkeys(zip(twice["dataset"].to_pylist(), twice["fingerprint"].to_pylist(), strict=True)))


def rows_of(rows: pa.Table, dataset: str, fingerprint: str, version: dict[int, Content]) -> pa.Table:
    """Return the rows without those that are about this model on this data, but about no sample of the version."""
    columns = (rows.column(name).to_pylist() for name in SAMPLE_COLUMNS)
    keep = [
        (data, model) != (dataset, fingerprint) or version.get(index) == (name, label)
        for data, model, index, name, label in zip(*columns, strict=True)
    ]
    return rows.filter(pa.array(keep, type=pa.bool_()))


def _stem(fingerprint: str, dataset: str) -> str:
    return f"{fingerprint}-{dataset.replace('/', '%')}-"


def _slices(root: Path, fingerprint: str, dataset: str) -> list[tuple[int, list[tuple[int, str, int]]]]:
    """Return (time, samples) of each slice, the newest first; what cannot be read says nothing."""
    found = []
    stem = _stem(fingerprint, dataset)
    for path in sorted((root / "slices").glob("*.json")):
        if not path.name.startswith(stem) or {"-", "@"} & set(path.stem[len(stem) :]):
            continue
        try:
            found.append(slice_of(path))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(found, key=lambda part: part[0], reverse=True)
