"""One block in cascade mode: what is proven is spared the attacks, what has fallen is spared all that come after.

First come the certifiers that cost less than a thorough attack (`Certifier.cheap`), each on what none before it has
proven; then the attacks, each on what still stands; then the other certifiers, on what stands and is not proven. All
are asked about correct samples alone. The first method that applies sees every sample all the same, so that records
alone tell which samples a threat was judged on.

A deterministic certificate of the very threat spares a sample the attacks, unless the sample is in the audit: a share
of all samples, drawn by seed, is attacked whatever was proven, so that a certifier that errs does not go unseen.
"""

from __future__ import annotations

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
    part: Samples, tasks: list[Task], subject: Subject, ledger: Ledger, clean: pa.Table, audit: float, seed: int
) -> list[pa.Table]:
    """Return the rows of each task about one threat, in the order of the tasks.

    Args:
        part: the samples of the block.
        tasks: what to run.
        subject: the model.
        ledger: fetches or computes rows.
        clean: the clean rows of the block.
        audit: share of the samples that are attacked although they are proven.
        seed: of their draw.
    """
    correct, drawn = _mask(clean, "correct"), part.lots("audit", seed) < audit
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


def _mask(rows: pa.Table, column: str) -> _Mask:
    mask: _Mask = rows.column(column).to_numpy(zero_copy_only=False).astype(bool)
    return mask
