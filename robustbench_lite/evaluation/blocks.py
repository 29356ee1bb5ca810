"""The blocks of an evaluation, and the order in which methods meet them.

Without a budget block after block, in each all methods, so that a killed run leaves finished blocks. With one, method
after method, each on all blocks, what pays first (`budget.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pyarrow as pa

from robustbench_lite.evaluation.budget import SLICE
from robustbench_lite.evaluation.cascade import Cascade
from robustbench_lite.evaluation.cells import block_of
from robustbench_lite.evaluation.ledger import Ledger
from robustbench_lite.evaluation.plan import Task
from robustbench_lite.evaluation.records import empty_records
from robustbench_lite.evaluation.samples import Samples

__all__ = ["Block", "Tables", "block_after_block", "cut", "what_pays_first"]

Tables = dict[str, pa.Table]
"""The rows of one block by the keys of their cells."""


class Block:
    """The samples of one block, and the rows about them.

    Args:
        part: the samples, in the order of their indices.
        tasks: the plan's: the clean answers come first.
        ledger: fetches or computes rows.
        audit: in a cascade, the share of the samples that are attacked although they are proven; None: no cascade.

    Attributes:
        part: the samples.
        number: of the block.
        tables: the rows of each cell by its key, empty where there are none yet.
    """

    def __init__(self, part: Samples, tasks: Sequence[Task], ledger: Ledger, audit: float | None) -> None:
        self.part, self.number = part, int(block_of(part.indices)[0])
        self._ledger, self._audit = ledger, audit
        self._clean, self._seed = ledger.fetch(tasks[0], part), tasks[0].cell.seed
        self.tables = {task.cell.key: empty_records() for task in tasks} | {tasks[0].cell.key: self._clean}
        self._answered = part.take(np.isin(part.indices, self._clean.column("index").to_numpy()))
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
    """Yield the samples of each block, in the order of their indices, and show how far it is."""
    numbers = block_of(samples.indices)
    order = [np.flatnonzero(numbers == b) for b in np.unique(numbers)]
    parts = (samples.take(rows[np.argsort(samples.indices[rows], kind="stable")]) for rows in order)
    if not progress:
        return parts
    from rich.progress import track

    return track(parts, description="evaluating", total=len(order))


def block_after_block(
    parts: Iterable[Samples], tasks: Sequence[Task], ledger: Ledger, audit: float | None, done: Callable[[Block], None]
) -> list[Tables]:
    """Run all methods on one block after the other, call `done` with each that is finished, and return the rows."""
    found = []
    for part in parts:
        block = Block(part, tasks, ledger, audit)
        for task in tasks[1:] if audit is None else sorted(tasks[1:], key=lambda task: (task.threat, task.stage)):
            block.run(task)
        done(block)
        found.append(block.tables)
    return found


def what_pays_first(
    parts: Iterable[Samples], tasks: Sequence[Task], ledger: Ledger, audit: float | None, done: Callable[[Block], None]
) -> list[Tables]:
    """Run one method after the other on all blocks, first those that break most for what they cost."""
    blocks = [Block(part, tasks, ledger, audit) for part in parts]
    proofs, attacks, dear = ([task for task in tasks[1:] if task.stage == stage] for stage in range(3))
    _run(proofs, blocks)
    worth: dict[str, float] = {}
    for task in attacks:
        own = [proof for proof in proofs if proof.threat == task.threat]
        rows = blocks[0].slice(task, own, SLICE) if blocks else empty_records()
        worth[task.cell.key] = ledger.purse.worth(rows) if len(rows) else -1.0
    _run(sorted(attacks, key=lambda task: worth[task.cell.key], reverse=True), blocks)
    _run(dear, blocks)
    for block in blocks:
        done(block)
    return [block.tables for block in blocks]


def _run(tasks: Iterable[Task], blocks: list[Block]) -> None:
    for task in tasks:
        for block in blocks:
            block.run(task)
