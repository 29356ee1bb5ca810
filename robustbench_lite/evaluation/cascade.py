"""One block in cascade mode: what is proven is spared the attacks, what has fallen is spared all that come after.

First come the certifiers that cost less than a thorough attack (`Certifier.cheap`), each on what none before it has
proven; then the attacks, each on what still stands; then the other certifiers, on what stands and is not proven. All
are asked about correct samples alone. The first method that applies sees every sample all the same, so that records
alone tell which samples a threat was judged on.

A deterministic certificate of the very threat spares a sample the attacks, unless the sample is in the audit: a share
of all samples, drawn by seed, is attacked whatever was proven, so that a certifier that errs does not go unseen.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa

from robustbench_lite.evaluation.ledger import Ledger
from robustbench_lite.evaluation.methods import sparing
from robustbench_lite.evaluation.plan import Task
from robustbench_lite.evaluation.samples import Samples
from robustbench_lite.evaluation.subject import Subject

__all__ = ["cascade"]

_Mask = np.ndarray[Any, np.dtype[np.bool_]]


def cascade(
    part: Samples, tasks: list[Task], subject: Subject, ledger: Ledger, clean: pa.Table, audit: float
) -> list[pa.Table]:
    """Return the rows of each task about one threat, in the order of the tasks.

    Args:
        part: the samples of the block.
        tasks: what to run.
        subject: the model.
        ledger: fetches or computes rows.
        clean: the clean rows of the block.
        audit: share of the samples that are attacked although they are proven.
    """
    correct, drawn = _mask(clean, "correct"), _drawn(part, audit, tasks)
    proven, fallen = np.zeros_like(correct), np.zeros_like(correct)
    tables: dict[str, pa.Table] = {}
    judged = False  # whether a method has seen every sample
    for task in sorted(tasks, key=lambda task: task.stage):
        attack = task.cell.kind == "attack"
        open_ = ~fallen & (drawn | ~proven) if attack else ~proven & (~fallen | (task.stage == 0))
        given = correct & open_ if judged else np.ones_like(correct)
        run = sparing(task.run, subject, clean) if attack and not judged else None
        rows = tables[task.cell.key] = ledger.fetch(task, part.take(given), run)
        if task.cell.key in ledger.refused:
            continue
        judged, asked = True, np.flatnonzero(given)
        if attack:
            fallen[asked[_mask(rows, "success")]] = True
        else:
            sure = rows.column("certificate").to_numpy(zero_copy_only=False) == "deterministic"
            proven[asked[_mask(rows, "certified") & sure]] = True
    return [tables[task.cell.key] for task in tasks]


def _drawn(part: Samples, share: float, tasks: list[Task]) -> _Mask:
    """Return which samples are in the audit: by image and seed, whatever the block and the order."""
    seed = tasks[0].cell.seed if tasks else 0
    numbers = [hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest() for name in part.hashes]
    return np.array([int.from_bytes(number, "big") < share * 2**64 for number in numbers], dtype=bool)


def _mask(rows: pa.Table, column: str) -> _Mask:
    mask: _Mask = rows.column(column).to_numpy(zero_copy_only=False).astype(bool)
    return mask
