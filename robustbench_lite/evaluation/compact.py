"""Compaction: the small files of each cell become few large ones, while others read and write the store.

A merged file holds the rows of up to 20 neighbouring blocks, each once (`precedence`) and by index, and the examples
that belong to them. Files that were made under other versions or on another device keep files of their own, since a
file says how its rows came about. The order of events makes a kill harmless:

1. the merged files appear, examples before records, each whole or not at all; rows are now there twice, and read once;
2. they are read back and compared with what was merged;
3. the old files go, records before examples. Files that somebody wrote meanwhile are not among them.

Whatever is removed stands in a file that the same compaction wrote before, so that two at a time lose nothing either.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from robustbench_lite.evaluation.cells import BLOCKS_PER_FILE
from robustbench_lite.evaluation.examples import Examples, read_examples, write_examples
from robustbench_lite.evaluation.files import remove_leftovers, write_files
from robustbench_lite.evaluation.folders import fresh_path, settled, span
from robustbench_lite.evaluation.parquet import DAMAGE, only_damage, read_rows, read_whole, write_rows
from robustbench_lite.evaluation.precedence import chosen
from robustbench_lite.evaluation.records import SCHEMA
from robustbench_lite.evaluation.store import Store, StoreError

__all__ = ["Compaction", "compact"]

LARGEST = 256 * 2**20  # bytes of examples in one merged file: what a reader holds in memory


@dataclass(frozen=True)
class Compaction:
    """What a compaction did.

    Attributes:
        cells: folders looked at.
        before: files of records and examples there were.
        after: files there are.
        left: what was left as it is, and why.
    """

    cells: int = 0
    before: int = 0
    after: int = 0
    left: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _File:
    """One file of records, read: its path, its metadata, its rows, and the examples beside it."""

    path: Path
    about: dict[bytes, bytes]
    rows: pa.Table
    examples: Examples | None


@dataclass(frozen=True, eq=False)
class _Merged:
    """What goes into one file: rows that have no index twice, by index, and their examples."""

    rows: pa.Table
    examples: Examples | None


def compact(store: Store | Path | str) -> Compaction:
    """Merge the small files of each cell.

    Safe beside readers, writers and other compactions, and against a kill at any moment.

    Raises:
        StoreError: there is no such store, it cannot be written, or a newer version of this package has written it.
        OSError: the disk is full; every row is still there.
    """
    opened = store if isinstance(store, Store) else Store(store)
    folders = opened.folders()
    opened.require_writable()
    done = Compaction(len(folders))
    for folder in folders:
        remove_leftovers(folder)
        before = _count(folder)
        for few in settled(folder, _bins):
            done.left.extend(_merge(folder, few))
        done = replace(done, before=done.before + before, after=done.after + _count(folder))
    return done


def _count(folder: Path) -> int:
    return sum(path.suffix in (".parquet", ".safetensors") for path in folder.iterdir())


def _bins(paths: list[Path]) -> list[list[Path]]:
    """Return the files that go together: of one group of blocks, by their order, with examples that fit in memory."""
    bins: list[list[Path]] = []
    where, size = -1, 0
    for path in sorted(paths, key=lambda path: (span(path), path.name)):
        examples = path.with_suffix(".safetensors")
        own, group = examples.stat().st_size if examples.exists() else 0, span(path)[0] // BLOCKS_PER_FILE
        if group != where or size + own > LARGEST:
            bins.append([])
            where, size = group, 0
        bins[-1].append(path)
        size += own
    return [few for few in bins if len(few) > 1]


def _merge(folder: Path, paths: list[Path]) -> list[str]:
    """Merge files of one cell as far as they go together; return what was left, and why."""
    left: list[str] = []
    files = [file for path in paths if (file := _read(path, left)) is not None]
    kinds: dict[tuple[tuple[bytes, bytes], ...], list[_File]] = {}
    for file in files:
        kinds.setdefault(tuple(sorted(file.about.items())), []).append(file)
    for few in kinds.values():
        layers = _layers(few)
        if len(few) > len(layers):  # else nothing is gained
            _replace(folder, few, layers)
    return left


def _read(path: Path, left: list[str]) -> _File | None:
    """Read a file with its examples; one that is damaged, or has gone, is left as it is."""
    beside = path.with_suffix(".safetensors")
    try:
        about, rows = read_whole(path, SCHEMA.names)
        examples = read_examples(beside) if beside.exists() else None
        # records go before examples: while they are there, what was read beside them is all there is
        return _File(path, about, rows, examples) if path.exists() else None
    except FileNotFoundError:
        return None  # another compaction was quicker
    except DAMAGE as error:
        only_damage(error)
        left.append(f"{path.parent.name}/{path.name}: {error}")
        return None


def _layers(files: list[_File]) -> list[_Merged]:
    """Return the rows of several files, each once, in as few tables as will do.

    Examples go by their index, so an index that stands for two images (the data have changed) needs two tables.
    """
    places = [(number, place) for number, file in enumerate(files) for place in range(len(file.rows))]
    rows = pa.concat_tables([file.rows for file in files])
    layers: list[list[tuple[int, int]]] = []  # of each: the file and the position of each row
    taken: list[set[int]] = []
    indices = rows["index"].to_pylist()
    for row in chosen(rows):
        layer = next((i for i, held in enumerate(taken) if indices[row] not in held), len(taken))
        if layer == len(taken):
            taken.append(set())
            layers.append([])
        taken[layer].add(indices[row])
        layers[layer].append(places[row])
    return [_collect(files, own) for own in layers]


def _collect(files: list[_File], own: list[tuple[int, int]]) -> _Merged:
    tables, parts = [], []
    for number, file in enumerate(files):
        rows = file.rows.take(pa.array([place for owner, place in own if owner == number], pa.int64()))
        tables.append(rows.replace_schema_metadata(files[0].about))
        if file.examples is not None:
            mine = np.isin(file.examples.index, rows["index"].to_numpy())
            parts.append(file.examples.take(np.flatnonzero(mine)))
    examples = Examples.join(parts)
    order = None if examples is None else np.argsort(examples.index, kind="stable")
    table = pa.concat_tables(tables).combine_chunks()
    return _Merged(table.sort_by("index"), None if examples is None or order is None else examples.take(order))


def _replace(folder: Path, files: list[_File], layers: list[_Merged]) -> None:
    """Write the merged files, read them back, and only then remove the old ones."""
    first, last = min(span(file.path)[0] for file in files), max(span(file.path)[1] for file in files)
    for merged in layers:
        path = fresh_path(folder, first, last)
        _write(path, merged)
        if not _same(path, merged):
            raise StoreError(f"{path} does not read back as it was written; the old files are still there")
    for file in files:
        file.path.unlink(missing_ok=True)
        file.path.with_suffix(".safetensors").unlink(missing_ok=True)


def _write(path: Path, merged: _Merged) -> None:
    examples = merged.examples
    files = [(path, lambda stream: write_rows(merged.rows, stream))]
    if examples is not None:
        files.insert(0, (path.with_suffix(".safetensors"), lambda stream: write_examples(examples, stream)))
    write_files(files)


def _same(path: Path, merged: _Merged) -> bool:
    """Read a merged file back; one that another compaction has merged on meanwhile is in good hands."""
    try:
        rows = read_rows(path, SCHEMA.names)
        examples = None if merged.examples is None else read_examples(path.with_suffix(".safetensors"))
    except FileNotFoundError:
        return True
    if not _equal(rows, merged.rows):
        return False
    if examples is None or merged.examples is None:
        return True
    kept, wanted = examples.tensors(), merged.examples.tensors()
    return kept.keys() == wanted.keys() and all(np.array_equal(kept[k], wanted[k], equal_nan=True) for k in kept)


def _equal(one: pa.Table, two: pa.Table) -> bool:
    """Say whether two tables are equal, NaN being equal to NaN."""
    return all(
        one[name].equals(two[name]) or str(one[name].to_pylist()) == str(two[name].to_pylist()) for name in SCHEMA.names
    )
