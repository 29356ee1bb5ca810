"""How the jobs of a sweep ended. Each leaves a file in the sweep's folder, whatever machine it ran on."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from robustbench_lite.app.receipts import Receipt
from robustbench_lite.evaluation.files import put

__all__ = ["Ended", "forget", "outcomes", "record"]

_PATTERN = "job-*.json"


@dataclass(frozen=True)
class Ended:
    """The end of one job: its number, its overrides, and its receipt or its error."""

    num: int
    overrides: list[str]
    receipt: dict[str, Any] | None = None
    error: str = ""
    traceback: str = field(default="", repr=False)

    @property
    def name(self) -> str:
        """The job in words."""
        return " ".join(self.overrides) or f"job {self.num}"


def record(folder: Path, ended: Ended) -> None:
    """Write the end of a job."""
    put(folder / f"job-{ended.num:05d}.json", json.dumps(asdict(ended), indent=1).encode())


def outcomes(folder: Path) -> list[tuple[Ended, Receipt | None]]:
    """Return how the jobs of a sweep ended, in their order."""
    found = [Ended(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob(_PATTERN))]
    return [(ended, Receipt(**ended.receipt) if ended.receipt else None) for ended in found]


def forget(folder: Path) -> None:
    """Remove the folder of a sweep whose jobs are all in the store."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.parent.is_dir() and not any(folder.parent.iterdir()):
        folder.parent.rmdir()
