"""The folder of a cell: which blocks each of its files holds, and how to read it while others merge files there.

    00003-1f0e6c2a9b4d.parquet           rows of block 3
    00000_00019-7c9a01e2d5f3.parquet     rows of blocks 0 to 19: of a sparse draw, or merged (`compact`)

Whoever merges writes the new file before the old ones go. A reader may meet both: rows have names and are taken once. A
reader may also hold the name of a file that has gone since: it then reads the folder again.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

__all__ = ["fresh_path", "listed", "meets", "overlap", "settled", "span"]

T = TypeVar("T")

_TRIES = 20  # readings that a merge may spoil; each needs a merge of its own, and a merge reads and flushes every file


def span(path: Path) -> tuple[int, int]:
    """Return the first and the last block of a file, by its name.

    Raises:
        ValueError: it is no name of ours.
    """
    first, _, last = path.name.partition("-")[0].partition("_")
    return int(first), int(last or first)


def meets(path: Path, blocks: set[int]) -> bool:
    """Say whether a file of ours may have rows of one of these blocks."""
    first, last = span(path)
    return any(first <= block <= last for block in blocks)


def fresh_path(folder: Path, first: int, last: int) -> Path:
    """Return a path that nobody else will choose, for the records of these blocks."""
    blocks = f"{first:05d}" if first == last else f"{first:05d}_{last:05d}"
    return folder / f"{blocks}-{uuid.uuid4().hex[:12]}.parquet"


def overlap(paths: list[Path]) -> bool:
    """Say whether two files may have rows of one block."""
    spans = sorted(span(path) for path in paths)
    return any(after[0] <= before[1] for before, after in pairwise(spans))


def listed(folder: Path) -> list[Path]:
    """Return the files of records in a folder, sorted: what two listings in a row agree on.

    A single listing may miss a merged file that came while it was made, and the old ones that went meanwhile.
    """
    before: list[Path] | None = None
    while (now := sorted(path for path in folder.glob("*.parquet") if _ours(path))) != before:
        before = now
    return now


def settled(folder: Path, read: Callable[[list[Path]], T]) -> T:
    """Return what `read` makes of the files of a folder; it is asked again where one has gone meanwhile.

    Raises:
        FileNotFoundError: files go as fast as they are read.
    """
    for _ in range(_TRIES):
        try:
            return read(listed(folder))
        except FileNotFoundError:
            continue
    return read(listed(folder))


def _ours(path: Path) -> bool:
    try:
        span(path)
    except ValueError:
        return False
    return True
