"""The store: records in parquet files, addressed row by row.

    STORE/cells/<cell>/<block>-<unique>.parquet         records of one cell, of a block of 500 dataset indices
    STORE/cells/<cell>/<block>-<unique>.safetensors     the adversarial examples of its successes
    STORE/cells/<cell>/<first>_<last>-<unique>.*        the same of several blocks: a sparse draw's, or merged
    STORE/flags/<fingerprint>-<dataset>@<threat>.json   flags that no record shows (`notes`)
    STORE/slices/<fingerprint>-<dataset>-<content>.json the samples of each evaluation (`versions`, `unanswered`)
    STORE/violations/<sample>.json, .safetensors        witnesses of the audit

A file appears whole or not at all, and its examples before it: a killed run loses what one method was at
(some 500 samples), nothing else.
Names are unique, so several machines may write to one store. A row that two of them wrote is read once (`precedence`).
Files may be merged at any time: who reads a cell and finds one gone reads the cell again (`folders`). docs/store.md has
the rest.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from robustbench_lite.evaluation.cells import BLOCK, Cell, SampleNames, block_of, sample_keys
from robustbench_lite.evaluation.examples import Examples, read_examples, write_examples
from robustbench_lite.evaluation.files import remove_leftovers, require_writable, set_aside, write_files
from robustbench_lite.evaluation.folders import fresh_path, meets, overlap, settled
from robustbench_lite.evaluation.notes import Run, keep_notes, read_notes
from robustbench_lite.evaluation.parquet import (
    DAMAGE,
    StoreError,
    metadata,
    only_damage,
    reaches,
    read_head,
    read_metadata,
    read_rows,
    write_rows,
)
from robustbench_lite.evaluation.parts import CONSTANT, Head, Part, rank_of
from robustbench_lite.evaluation.precedence import best_first, each_once, repeated
from robustbench_lite.evaluation.records import SCHEMA, empty_records, to_frame
from robustbench_lite.evaluation.unanswered import keep_run, unanswered
from robustbench_lite.evaluation.versions import SAMPLE_COLUMNS, ambiguous, keep_slice, newest, rows_of

__all__ = ["Store", "StoreError"]

_LOG = logging.getLogger(__name__)
_KEY = ("index", "sample_hash", "label")


class Store:
    """Records and examples under one folder.

    Attributes:
        root: the folder.
        warnings: what was found damaged, in words.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.warnings: list[str] = []
        self._visited: set[Path] = set()

    def require_writable(self) -> None:
        """Prove that the store can be written, before hours are spent on what it cannot keep.

        Raises:
            StoreError: it cannot.
        """
        try:
            require_writable(self.root)
        except OSError as error:
            raise StoreError(error.strerror) from error

    def rows(self, cell: Cell, indices: np.ndarray[Any, Any]) -> pa.Table:
        """Return the records of a cell about these dataset indices, each once; damaged files are set aside.

        Raises:
            NewerSchemaError: a file has a newer schema.
        """
        folder = self._folder(cell)
        if folder not in self._visited:
            self._visited.add(folder)
            remove_leftovers(folder)
        blocks, ends = set(block_of(indices).tolist()), (int(indices.min()), int(indices.max()))
        tables = settled(folder, lambda paths: [self._sound(path, ends) for path in paths if meets(path, blocks)])
        rows = pa.concat_tables([empty_records(), *tables])
        return cell.renamed(each_once(rows.filter(pc.is_in(rows["index"], pa.array(indices)))))

    def write(self, cell: Cell, rows: pa.Table, examples: Examples | None, device: str) -> None:
        """Add records of one group of blocks, and the examples of their successes, which reach the disk first.

        Raises:
            OSError: the disk is full or cannot be written; nothing of this call is kept.
        """
        folder = self._folder(cell)
        folder.mkdir(parents=True, exist_ok=True)
        blocks = block_of(rows.column("index").to_numpy())
        path = fresh_path(folder, int(blocks.min()), int(blocks.max()))
        table = rows.replace_schema_metadata(metadata(cell, device))
        files: list[tuple[Path, Callable[[BinaryIO], None]]] = [(path, lambda stream: write_rows(table, stream))]
        if examples is not None and len(examples.index):
            files.insert(0, (path.with_suffix(".safetensors"), lambda stream: write_examples(examples, stream)))
        write_files(files)

    def examples(self, cell: Cell, sample: tuple[int, str, int]) -> Iterator[Examples]:
        """Yield the stored examples beside a cell's rows about a sample; first those of the row that is read.

        The sample is (index, image hash, label): its index alone may have stood for another image.
        """
        blocks = {sample[0] // BLOCK}
        found = settled(
            self._folder(cell), lambda paths: [self._example(path, sample) for path in paths if meets(path, blocks)]
        )
        rows = pa.concat_tables([empty_records(), *(row for row, _ in found)])
        beside = [examples for row, examples in found if len(row)]
        yield from (examples for place in best_first(rows) if (examples := beside[place]) is not None)

    def examples_of(self, records: Path) -> Examples | None:
        """Return the examples beside a file of records; None where there are none, or where they are damaged."""
        path = records.with_suffix(".safetensors")
        if not path.exists() or not records.exists():
            return None
        try:
            return read_examples(path)
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            self._report(str(error))
            return None

    def folders(self) -> list[Path]:
        """Return the folder of each cell.

        Raises:
            StoreError: there is no such store.
        """
        if not self.root.is_dir():
            raise StoreError(f"there is no store at {self.root}")
        return sorted(path for path in (self.root / "cells").glob("*") if path.is_dir())

    def heads(self) -> Iterator[Head]:
        """Yield what each cell is about, in the order of tables; one without a sound row is left out.

        Raises:
            StoreError: there is no such store.
            NewerSchemaError: a file has a newer schema.
        """
        found = (settled(folder, self._head) for folder in self.folders())
        yield from sorted((head for head in found if head), key=lambda head: (rank_of(head.identity), head.name))

    def parts(self) -> Iterator[Part]:
        """Yield every sound file of records; damaged ones are reported.

        Raises:
            StoreError: there is no such store.
            NewerSchemaError: a file has a newer schema.
        """
        for folder in self.folders():
            yield from settled(folder, lambda paths: [part for path in paths if (part := self._part(path))])

    def file_records(self, part: Part) -> pd.DataFrame | None:
        """Return the records of one file; None where it is damaged.

        Raises:
            FileNotFoundError: it has been merged with others meanwhile.
        """
        try:
            return to_frame(read_rows(part.path, SCHEMA.names))
        except DAMAGE as error:
            only_damage(error)
            self._report(f"damaged records {part.path.relative_to(self.root)}: {error}")
            return None

    def cell_records(self, name: str, indices: Iterable[int]) -> pa.Table | None:
        """Return the records of the cell of this name about these dataset indices, each once; None if all are damaged.

        Raises:
            NewerSchemaError: a file has a newer schema.
        """
        blocks = {index // BLOCK for index in indices}

        def read(paths: list[Path]) -> pa.Table | None:
            wanted = [path for path in paths if meets(path, blocks)]
            return self._cell_records(wanted, SCHEMA.names, {}) if wanted else None

        return settled(self.root / "cells" / name, read)

    def columns(self, name: str, columns: Iterable[str]) -> pa.Table:
        """Return these columns of the cell of this name, each row once.

        Raises:
            NewerSchemaError: a file has a newer schema.
        """
        wanted = list(columns)
        return settled(self.root / "cells" / name, lambda paths: self._cell_records(paths, wanted, {}))

    def records(
        self,
        columns: Iterable[str] | None = None,
        *,
        all_versions: bool = False,
        cells: Iterable[str] | None = None,
        **equal: Any,
    ) -> pd.DataFrame:
        """Return the records as a frame, each row once; nothing is changed on the disk.

        Where an index stands for another image or label than it did when a model was first evaluated, the rows about
        the older data are left out, and `warnings` says so.

        Args:
            columns: the columns to read; None for all.
            all_versions: keep the rows about older data.
            cells: read the cells of these names alone.
            equal: keep rows whose column has this value, such as `dataset="digits"`.

        Raises:
            StoreError: there is no such store.
            NewerSchemaError: a file has a newer schema.
        """
        names = list(SCHEMA.names if columns is None else columns)
        read = list(dict.fromkeys([*names, *SAMPLE_COLUMNS]))
        chosen = None if cells is None else set(cells)
        ranked = [
            settled(folder, lambda paths: (self._rank(paths), self._cell_records(paths, read, equal)))
            for folder in self.folders()
            if chosen is None or folder.name in chosen
        ]
        tables = [table for _, table in sorted(ranked, key=lambda cell: cell[0])]
        schema = pa.schema([SCHEMA.field(name) for name in read])
        whole = pa.concat_tables([schema.empty_table(), *tables])
        return to_frame((whole if all_versions else self._one_version(whole)).select(names))

    def put_slice(
        self, clean: Cell, samples: SampleNames, threats: Iterable[tuple[str, float | None]], *, complete: bool
    ) -> None:
        """Keep which samples were evaluated together; and if `clean` lacks some of their answers, under which threats.

        Raises:
            OSError: it cannot be written.
        """
        stem = keep_slice(self.root, clean.fingerprint, clean.dataset, samples)
        if not complete:
            keep_run(self.root, stem, clean, threats)

    def put_flags(self, fingerprint: str, dataset: str, flags: Iterable[Mapping[str, Any]], run: Run) -> None:
        """Keep the flags that a model raised on a data set in an evaluation, and its notes (`notes.py`).

        Raises:
            OSError: they cannot be written.
        """
        for damage in keep_notes(self.root, fingerprint, dataset, flags, run):
            self._report(damage)

    def flags(self) -> dict[tuple[str, str], list[dict[str, Any]]]:
        """Return flags, notes of checks that were made, and which clean answers are missing, by (model, dataset)."""
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for path in sorted((self.root / "flags").glob("*@*.json")):
            try:
                model, notes = read_notes(path)
                found.setdefault(model, []).extend(notes)
            except (ValueError, OSError) as error:
                self._report(f"damaged flags {path.name}: {error}")
        for model, note in unanswered(self.root, lambda cell: self.columns(cell, _KEY)):
            found.setdefault(model, []).append(note)
        return found

    def _folder(self, cell: Cell) -> Path:
        return self.root / "cells" / cell.key

    def _head(self, paths: list[Path]) -> Head | None:
        for path in paths:
            try:
                kept, row = read_head(path, list(CONSTANT))
                if row is not None:
                    return Head(path.parent.name, json.loads(kept[b"identity"]), row)
            except DAMAGE as error:
                only_damage(error)
        return None

    def _part(self, path: Path) -> Part | None:
        try:
            kept = read_metadata(path)
            identity, made = json.loads(kept[b"identity"]), json.loads(kept[b"environment"])
            return Part(path, identity, made, kept[b"defense"].decode())
        except DAMAGE as error:
            only_damage(error)
            self._report(f"damaged records {path.relative_to(self.root)}: {error}")
            return None

    def _example(self, records: Path, sample: tuple[int, str, int]) -> tuple[pa.Table, Examples | None]:
        """Return the row that a file has of a sample, if any, and the examples beside it.

        Raises:
            FileNotFoundError: it has gone meanwhile.
        """
        rows = self._sound(records)
        own = rows.filter(pa.array([key == sample for key in sample_keys(rows)], pa.bool_()))
        found = self.examples_of(records) if len(own) else None
        if not records.exists():
            raise FileNotFoundError(records)  # merged meanwhile: the examples may have gone before they were read
        return own, found

    def _sound(self, path: Path, ends: tuple[int, int] | None = None) -> pa.Table:
        """Read a whole file, or nothing of one without indices between these; a damaged one is moved aside: no rows.

        Raises:
            FileNotFoundError: it has gone meanwhile.
        """
        try:
            return empty_records() if ends and not reaches(path, *ends) else read_rows(path, SCHEMA.names)
        except DAMAGE as error:
            only_damage(error)
            self._report(f"damaged records {path.relative_to(self.root)}: {error}; set aside, to be computed again")
            with suppress(OSError):  # a store that can only be read: the damaged file stays, and is read no further
                set_aside(path)
            return empty_records()

    def _cell_records(self, paths: list[Path], names: list[str], equal: dict[str, Any]) -> pa.Table:
        twice = overlap(paths)  # only then can a row be there twice
        table = self._columns(paths, [*names, *equal, *(_KEY if twice else ())])
        if twice and repeated(table):
            table = each_once(self._columns(paths, SCHEMA.names))
        for name, value in equal.items():
            table = table.filter(pc.equal(table.column(name), pa.scalar(value, SCHEMA.field(name).type)))
        return table.select(names)

    def _columns(self, paths: list[Path], names: list[str]) -> pa.Table:
        """Return columns of all rows of some files, damaged ones left out."""
        wanted = list(dict.fromkeys(names))
        tables = [pa.schema([SCHEMA.field(name) for name in wanted]).empty_table()]
        for path in paths:
            try:
                tables.append(read_rows(path, wanted))
            except DAMAGE as error:
                only_damage(error)
                self._report(f"damaged records {path.relative_to(self.root)}: {error}; left out")
        return pa.concat_tables(tables)

    def _one_version(self, rows: pa.Table) -> pa.Table:
        """Leave out what a model was asked about older data of the same name; unknown slices are older."""
        for dataset, fingerprint in ambiguous(rows):
            kept = rows_of(rows, dataset, fingerprint, newest(self.root, fingerprint, dataset))
            self._report(
                f"{dataset} has changed since the model {fingerprint} was first evaluated on it: "
                f"{len(rows) - len(kept)} rows about other images or labels are left out"
            )
            rows = kept
        return rows

    def _rank(self, paths: list[Path]) -> tuple[str, str]:
        """Order cells by their identity rather than its hash, so that tables keep their order of columns."""
        for path in paths:
            try:
                return rank_of(json.loads(read_metadata(path)[b"identity"])), path.parent.name
            except DAMAGE as error:
                only_damage(error)
        return "", ""

    def _report(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)
            _LOG.warning(message)
