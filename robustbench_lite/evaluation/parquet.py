"""Files of records: parquet with checksums, whose metadata say which cell they belong to and how they came about."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from robustbench_lite.evaluation.cells import Cell
from robustbench_lite.evaluation.environment import environment
from robustbench_lite.evaluation.records import SCHEMA, SCHEMA_VERSION
from robustbench_lite.evaluation.specs import canonical

__all__ = [
    "DAMAGE",
    "NewerSchemaError",
    "StoreError",
    "metadata",
    "only_damage",
    "reaches",
    "read_head",
    "read_metadata",
    "read_rows",
    "read_whole",
    "write_rows",
]

DAMAGE = (pa.ArrowException, OSError, ValueError, KeyError)  # what a parquet or JSON reader says of broken bytes


class StoreError(RuntimeError):
    """The store cannot be used as asked."""


class NewerSchemaError(StoreError):
    """The store was written by a newer version of this package."""


def metadata(cell: Cell, device: str) -> dict[str, str]:
    """Return what a file of records says of itself: schema, identity, and the circumstances it was made under."""
    return {
        "schema_version": str(SCHEMA_VERSION),
        "identity": canonical(cell.identity),
        "defense": cell.defense,
        "environment": canonical(environment() | {"device": device}),
    }


def write_rows(rows: pa.Table, stream: BinaryIO) -> None:
    """Write a file of records, with a checksum on each page."""
    pq.write_table(rows, stream, compression="snappy", write_statistics=["index", "kind"], write_page_checksum=True)


def read_metadata(path: Path) -> dict[bytes, bytes]:
    """Return what a file of records says of itself.

    Raises:
        NewerSchemaError: a newer version of this package has written it.
        DAMAGE: it is damaged; or a system error, which carries a number.
    """
    with pq.ParquetFile(path) as file:
        kept: dict[bytes, bytes] = file.schema_arrow.metadata or {}
    _check_version(path, kept)
    return kept


def read_rows(path: Path, names: list[str]) -> pa.Table:
    """Return these columns of a file of records; raises what `read_metadata` raises."""
    return read_whole(path, names)[1].replace_schema_metadata(None)


def read_head(path: Path, names: list[str]) -> tuple[dict[bytes, bytes], dict[str, Any] | None]:
    """Return what a file of records says of itself, and these columns of its first row; raises as `read_metadata`."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        kept: dict[bytes, bytes] = file.schema_arrow.metadata or {}
        _check_version(path, kept)
        if file.metadata.num_rows == 0:
            return kept, None
        return kept, next(file.iter_batches(1, row_groups=[0], columns=names, use_threads=False)).to_pylist()[0]


def read_whole(path: Path, names: list[str]) -> tuple[dict[bytes, bytes], pa.Table]:
    """Return what a file of records says of itself, and these columns; raises what `read_metadata` raises."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        schema = file.schema_arrow  # made anew each time it is asked for
        kept: dict[bytes, bytes] = schema.metadata or {}
        _check_version(path, kept)
        there = [name for name in names if name in schema.names]
        table = file.read(columns=there, use_threads=False)
    for name in (name for name in names if name not in there and SCHEMA.field(name).nullable):
        table = table.append_column(SCHEMA.field(name), pa.nulls(len(table), SCHEMA.field(name).type))  # a later column
    return kept, table.select(names).cast(pa.schema([SCHEMA.field(name) for name in names]))


def reaches(path: Path, low: int, high: int) -> bool:
    """Say whether a file may have records about dataset indices from `low` to `high`: by its footer, without a page.

    Raises what `read_metadata` raises.
    """
    with pq.ParquetFile(path) as file:
        _check_version(path, file.schema_arrow.metadata or {})
        place = file.schema_arrow.get_field_index("index")
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    known = [group.column(place).statistics for group in groups]
    return any(seen is None or not seen.has_min_max or (seen.min <= high and seen.max >= low) for seen in known)


def only_damage(error: Exception) -> None:
    """Raise what is no damage: the system's own errors carry a number (too many open files, no permission ...)."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def _check_version(path: Path, metadata: dict[bytes, bytes]) -> None:
    version = int(metadata[b"schema_version"])
    if version > SCHEMA_VERSION:
        raise NewerSchemaError(
            f"{path} has schema version {version}, but this package knows {SCHEMA_VERSION}: upgrade robustbench_lite, "
            "or choose another store"
        )
