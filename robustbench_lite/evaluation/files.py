"""Files that are whole or absent: written under a temporary name, flushed to the disk, renamed."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

__all__ = ["TEMPORARY", "put", "remove_leftovers", "require_writable", "set_aside", "write_files"]

TEMPORARY = ".tmp"
STALE = 3600.0  # seconds after which an unfinished file has no living writer; a write takes far less than one


def write_files(files: list[tuple[Path, Callable[[BinaryIO], None]]]) -> None:
    """Write several files of one folder, then rename them in, in the order given: the last one makes the set count.

    Raises:
        OSError: the disk is full or cannot be written; nothing of the set that could be removed is left.
    """
    temporary = [path.with_name(f"{path.name}{TEMPORARY}-{uuid.uuid4().hex[:12]}") for path, _ in files]
    done: list[Path] = []
    try:
        for place, (_, write) in zip(temporary, files, strict=True):
            with place.open("wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
        for place, (path, _) in zip(temporary, files, strict=True):
            place.replace(path)
            done.append(path)
    except BaseException:
        for path in [*temporary, *done]:
            path.unlink(missing_ok=True)
        raise
    _sync_folder(files[-1][0].parent)


def put(path: Path, data: bytes) -> None:
    """Write one file whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_files([(path, lambda stream: _write(stream, data))])


def set_aside(path: Path) -> Path:
    """Rename a damaged file so that nothing reads it again, and return its new name."""
    aside = path.with_name(f"{path.name}.corrupt")
    path.replace(aside)
    return aside


def require_writable(folder: Path) -> None:
    """Make the folder and prove that a file can be written there.

    Raises:
        OSError: it cannot; the message says what to do.
    """
    probe = folder / f"probe{TEMPORARY}-{uuid.uuid4().hex[:12]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OSError(
            error.errno, f"the store {folder} cannot be written ({error.strerror}): choose another, or mend its rights"
        ) from error


def remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left in a folder: temporary files, and examples whose records never came.

    Readers ignore both. Only files older than an hour go, since another machine may be writing.
    """
    for path in [*folder.glob(f"*{TEMPORARY}-*"), *folder.glob("*.safetensors")]:
        orphan = path.suffix != ".safetensors" or not path.with_suffix(".parquet").exists()
        try:
            if orphan and time.time() - path.stat().st_mtime > STALE:
                path.unlink(missing_ok=True)
        except OSError:  # gone meanwhile, or a store that can only be read: nothing depends on it
            continue


def _write(stream: BinaryIO, data: bytes) -> None:
    stream.write(data)


def _sync_folder(folder: Path) -> None:
    """Flush the renames themselves, where the system can open folders."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
