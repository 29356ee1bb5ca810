"""One unit in cascade mode: what is proven is spared the attacks, what has fallen is spared all that come after.

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
from robustbench_lite.evaluation.plan import Task
from robustbench_lite.evaluation.samples import Samples

__all__ = ["Cascade"]

_Mask = np.ndarray[Any, np.dtype[np.bool_]]


class Cascade:
    """What is known of a unit's samples under one threat, and so which of them the next method sees.

    Args:
        part: the samples of the unit, in the order of their indices.
        clean: their clean rows.
        ledger: fetches or computes rows.
        audit: share of the samples that are attacked although they are proven.
        seed: of their draw.
    """

    def __init__(self, part: Samples, clean: pa.Table, ledger: Ledger, audit: float, seed: int) -> None:
        self._part, self._clean, self._ledger = part, clean, ledger
        self._correct, self._drawn = _mask(clean, "correct"), part.lots("audit", seed) < audit
        self._proven, self._fallen = np.zeros_like(self._correct), np.zeros_like(self._correct)
        self._judged = False  # whether a method has seen every sample

    def run(self, task: Task) -> pa.Table:
        """Return the rows of one method; methods come in the order of their stages."""
        attack = task.cell.kind == "attack"
        open_ = ~self._fallen & (self._drawn | ~self._proven)
        if not attack:
            open_ = ~self._proven & (~self._fallen | (task.stage == 0))
        given = self._part
        if self._judged:
            given = given.take(self._correct & open_).rebatched(self._ledger.batch_size)
        self._ledger.settle(task.cell.key, int(self._part.unit[0]))
        rows = self._ledger.fetch(task, given, self._clean if attack and not self._judged else None)
        if task.cell.key in self._ledger.refused:
            return rows
        self._judged |= len(rows) == len(self._part)
        asked = np.searchsorted(self._part.indices, rows.column("index").to_numpy())  # those that have an answer
        if attack:
            self._fallen[asked[_mask(rows, "success")]] = True
        else:
            sure = rows.column("certificate").to_numpy(zero_copy_only=False) == "deterministic"
            self._proven[asked[_mask(rows, "certified") & sure]] = True
        return rows


def _mask(rows: pa.Table, column: str) -> _Mask:
    mask: _Mask = rows.column(column).to_numpy(zero_copy_only=False).astype(bool)
    return mask
