"""How the jobs of a sweep ended. Each leaves files in the sweep's folder, whatever machine it ran on."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from robustbench_lite.app.receipts import Receipt
from robustbench_lite.evaluation.files import put

__all__ = ["Ended", "begin", "begun", "folder_for", "forget", "outcomes", "places", "record"]

_PATTERN, _BEGUN = "job-*.json", "begun-"


@dataclass(frozen=True)
class Ended:
    """The end of one job: its number, its overrides, and its receipt or its error; a shard has no receipt."""

    num: int
    overrides: list[str]
    receipt: dict[str, Any] | None = None
    error: str = ""
    traceback: str = field(default="", repr=False)
    shard: bool = False

    @property
    def name(self) -> str:
        """The job in words."""
        return " ".join(self.overrides) or f"job {self.num}"


def folder_for(store: str | None, name: str) -> str:
    """Return the folder of a sweep: in the store, or in the system's for temporary files if nothing can be written."""
    folder = Path(store or ".") / "sweeps" / name
    there = next((parent for parent in folder.absolute().parents if parent.is_dir()), Path("/"))
    try:
        with tempfile.TemporaryFile(dir=there) as probe:  # leaves nothing behind
            probe.write(b"0" * 4096)
    except OSError:
        folder = _elsewhere(folder)
    return folder.as_posix()


def places(folder: Path) -> list[Path]:
    """Return the folders that hold outcomes of a sweep."""
    return [place for place in dict.fromkeys([folder, _elsewhere(folder)]) if any(place.glob(_PATTERN))]


def begin(folder: Path, number: int) -> None:
    """Leave word that a job has begun: one that is lost leaves nothing else."""
    _put(folder, f"{_BEGUN}{number:05d}", b"")


def begun(folder: Path) -> set[int]:
    """Return the numbers of the jobs that have begun."""
    found = (path for place in (folder, _elsewhere(folder)) for path in place.glob(f"{_BEGUN}*"))
    return {int(path.name.removeprefix(_BEGUN)) for path in found}


def record(folder: Path, ended: Ended) -> None:
    """Write the end of a job; among the system's temporary files if the store cannot be written any more."""
    _put(folder, f"job-{ended.num:05d}.json", json.dumps(asdict(ended), indent=1).encode())


def outcomes(folder: Path) -> list[tuple[Ended, Receipt | None]]:
    """Return how the jobs of a sweep ended, in their order."""
    paths = sorted((path for place in places(folder) for path in place.glob(_PATTERN)), key=lambda path: path.name)
    found = [Ended(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    return [(ended, Receipt(**ended.receipt) if ended.receipt else None) for ended in found]


def forget(folder: Path) -> None:
    """Remove the folder of a sweep whose jobs are all in the store."""
    for place in dict.fromkeys([folder, _elsewhere(folder)]):
        shutil.rmtree(place, ignore_errors=True)
    with suppress(OSError):  # others are in it
        folder.parent.rmdir()


def _put(folder: Path, name: str, data: bytes) -> None:
    try:
        put(folder / name, data)
    except OSError:
        put(_elsewhere(folder) / name, data)


def _elsewhere(folder: Path) -> Path:
    return Path(tempfile.gettempdir()) / f"rbl-{folder.name.removeprefix('rbl-')}"
