"""The units of an evaluation, and the order in which methods meet them.

Without a budget unit after unit, on each all methods, so that a killed run leaves finished units. With one, method
after method, each on all units, what pays first (`budget.py`).

A unit is some batches that follow each other, about 500 samples. Proofs and attacks leave few of them; a cascade asks
what is left of all its batches together, as many at a time as a batch may have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pyarrow as pa

from robustbench_lite.evaluation.budget import SLICE
from robustbench_lite.evaluation.cascade import Cascade
from robustbench_lite.evaluation.ledger import Ledger
from robustbench_lite.evaluation.plan import Task
from robustbench_lite.evaluation.records import empty_records
from robustbench_lite.evaluation.samples import Samples

__all__ = ["Tables", "Unit", "cut", "unit_after_unit", "what_pays_first"]

Tables = dict[str, pa.Table]
"""The rows of one unit by the keys of their cells."""


class Unit:
    """The samples of one unit, and the rows about them.

    Args:
        part: the samples, in the order of their indices.
        tasks: the plan's: the clean answers come first.
        ledger: fetches or computes rows.
        audit: in a cascade, the share of the samples that are attacked although they are proven; None: no cascade.

    Attributes:
        part: the samples.
        number: of the unit.
        tables: the rows of each cell by its key, empty where there are none yet.
    """

    def __init__(self, part: Samples, tasks: Sequence[Task], ledger: Ledger, audit: float | None) -> None:
        self.part, self.number = part, int(part.unit[0])
        self._ledger, self._audit = ledger, audit
        self._clean, self._seed = ledger.fetch(tasks[0], part), tasks[0].cell.seed
        self.tables = {task.cell.key: empty_records() for task in tasks} | {tasks[0].cell.key: self._clean}
        answered = np.isin(part.indices, self._clean.column("index").to_numpy())
        self._answered = part if answered.all() else part.take(answered)
        self._cascades: dict[int, Cascade] = {}

    def run(self, task: Task) -> None:
        """Run a method on the samples that have a clean answer, or on those of them that a cascade leaves it."""
        if self._audit is None:
            self.tables[task.cell.key] = self._ledger.fetch(task, self._answered)
            return
        if task.threat not in self._cascades:
            cascade = Cascade(self._answered, self._clean, self._ledger, self._audit, self._seed)
            self._cascades[task.threat] = cascade
        self.tables[task.cell.key] = self._cascades[task.threat].run(task)

    def slice(self, task: Task, proofs: Iterable[Task], count: int) -> pa.Table:
        """Return the rows of an attack on the first samples that are right, and that none of these proofs covers."""
        right = self._clean.column("correct").to_numpy(zero_copy_only=False).astype(bool)
        for proof in proofs:
            rows = self.tables[proof.cell.key]
            sure = rows.filter(rows.column("certified"))
            right &= ~np.isin(self._answered.indices, sure.column("index").to_numpy())
        return self._ledger.fetch(task, self._answered.take(np.flatnonzero(right)[:count]))


def cut(samples: Samples, progress: bool = False) -> Iterable[Samples]:
    """Yield the samples of each unit, in the order of their indices, and show how far it is."""
    order = np.argsort(samples.indices, kind="stable")
    numbers = np.unique(samples.unit)
    parts = (samples.take(order[samples.unit[order] == number]) for number in numbers)
    if not progress:
        return parts
    from rich.progress import track

    return track(parts, description="evaluating", total=len(numbers))


def unit_after_unit(
    parts: Iterable[Samples], tasks: Sequence[Task], ledger: Ledger, audit: float | None, done: Callable[[Unit], None]
) -> list[Tables]:
    """Run all methods on one unit after the other, call `done` with each that is finished, and return the rows."""
    found = []
    for part in parts:
        unit = Unit(part, tasks, ledger, audit)
        for task in tasks[1:] if audit is None else sorted(tasks[1:], key=lambda task: (task.threat, task.stage)):
            unit.run(task)
        done(unit)
        found.append(unit.tables)
    return found


def what_pays_first(
    parts: Iterable[Samples], tasks: Sequence[Task], ledger: Ledger, audit: float | None, done: Callable[[Unit], None]
) -> list[Tables]:
    """Run one method after the other on all units, first those that break most for what they cost."""
    units = [Unit(part, tasks, ledger, audit) for part in parts]
    proofs, attacks, dear = ([task for task in tasks[1:] if task.stage == stage] for stage in range(3))
    _run(proofs, units)
    worth: dict[str, float] = {}
    for task in attacks:
        own = [proof for proof in proofs if proof.threat == task.threat]
        rows = units[0].slice(task, own, SLICE) if units else empty_records()
        worth[task.cell.key] = ledger.purse.worth(rows) if len(rows) else -1.0
    _run(sorted(attacks, key=lambda task: worth[task.cell.key], reverse=True), units)
    _run(dear, units)
    for unit in units:
        done(unit)
    return [unit.tables for unit in units]


def _run(tasks: Iterable[Task], units: list[Unit]) -> None:
    for task in tasks:
        for unit in units:
            unit.run(task)
