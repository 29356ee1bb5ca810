"""The ledger: takes from the store the rows it holds, has the rest computed, and adds it to the store."""

from __future__ import annotations

import pyarrow as pa
from numpy import arange, array, diff, flatnonzero, int64, split

from robustbench_lite.core.errors import NotApplicableError
from robustbench_lite.evaluation.cells import Cell, batch_of, block_of, sample_keys
from robustbench_lite.evaluation.examples import Examples
from robustbench_lite.evaluation.methods import Method
from robustbench_lite.evaluation.plan import Task
from robustbench_lite.evaluation.records import empty_records
from robustbench_lite.evaluation.samples import Samples
from robustbench_lite.evaluation.store import Store

__all__ = ["EvaluationError", "Ledger"]


class EvaluationError(RuntimeError):
    """A method failed on a block; what was finished before is kept."""


class Ledger:
    """The rows of one evaluation.

    Args:
        store: where rows are kept; None: nowhere.
        device: where they are computed; it is recorded.
        batch_size: samples in one call of a method, at most; the cuts are at fixed indices (`cells.batch_of`).

    Attributes:
        unsaved: what could not be written, with the system's reason.
        wrote: whether anything had to be computed and written.
        refused: why a method does not apply to the model, by the key of its cell; it is asked once, and has no rows.
    """

    def __init__(self, store: Store | None, device: str, batch_size: int) -> None:
        self.store, self.device, self.batch_size = store, device, batch_size
        self.unsaved: list[str] = []
        self.refused: dict[str, str] = {}
        self.wrote = False
        self._fresh: dict[str, list[Examples]] = {}  # examples computed for the block at hand

    def fetch(self, task: Task, part: Samples, run: Method | None = None) -> pa.Table:
        """Return one row for each sample of a part of one block, in its order; none of a method that does not apply.

        Args:
            task: the cell, and how to compute its rows.
            part: samples whose indices lie in one block.
            run: computes them in place of the task's own method.

        Raises:
            StoreError: rows must be computed, and the store cannot be written.
            EvaluationError: the method failed.
        """
        if len(part) == 0 or task.cell.key in self.refused:
            return empty_records()
        block = int(block_of(part.indices)[0])
        stored = empty_records() if self.store is None else self.store.rows(task.cell, block)
        known = set(sample_keys(stored))
        missing = array([place for place, key in enumerate(_keys(part)) if key not in known], dtype=int64)
        if len(missing):
            try:
                fresh = self._compute(task, part.take(missing), block, run or task.run)
            except NotApplicableError as error:
                self.refused[task.cell.key] = str(error)
                return empty_records()
            stored = pa.concat_tables([stored, fresh])
        places = {key: place for place, key in enumerate(sample_keys(stored))}
        return stored.take([places[key] for key in _keys(part)])

    def example(self, cell: Cell, sample: tuple[int, str, int]) -> Examples | None:
        """Return the adversarial example of one (index, hash, label) of the block at hand; None where there is none."""
        index = sample[0]
        block = int(block_of(array([index]))[0])
        stored = [] if self.store is None else self.store.examples(cell, block, sample)
        for examples in [*self._fresh.get(cell.key, []), *stored]:
            found = (examples.index == index).nonzero()[0]
            if len(found):
                return examples.take(found[:1])
        return None

    def forget(self) -> None:
        """Drop the examples of a block that is finished."""
        self._fresh.clear()

    def _compute(self, task: Task, part: Samples, block: int, run: Method) -> pa.Table:
        if self.store is not None and not self.wrote:
            self.store.require_writable()
            self.wrote = True
        tables, examples = [], []
        cuts = flatnonzero(diff(batch_of(part.indices, self.batch_size))) + 1
        for rows_of_batch in split(arange(len(part)), cuts):
            table, found = _guarded(task, part.take(rows_of_batch), block, run)
            tables.append(table)
            examples += [] if found is None else [found]
        rows, kept = pa.concat_tables(tables), Examples.join(examples)
        if kept is not None:
            self._fresh.setdefault(task.cell.key, []).append(kept)
        self._keep(task.cell, block, rows, kept)
        return rows

    def _keep(self, cell: Cell, block: int, rows: pa.Table, examples: Examples | None) -> None:
        """Write the rows. A full disk costs this cell its file, and nothing else: the evaluation goes on."""
        if self.store is None:
            return
        try:
            self.store.write(cell, block, rows, examples, self.device)
        except OSError as error:
            self.unsaved.append(f"{cell.method} ({cell.threat or 'clean'}), block {block}: {error}")


def _keys(part: Samples) -> list[tuple[int, str, int]]:
    return list(zip(part.indices.tolist(), part.hashes, part.targets.tolist(), strict=True))


def _guarded(task: Task, batch: Samples, block: int, run: Method) -> tuple[pa.Table, Examples | None]:
    """Run a method; name what failed where. That a method does not apply to a model is no failure."""
    try:
        return run(task.cell, batch)
    except Exception as error:
        cell = task.cell
        if isinstance(error, NotApplicableError):
            raise
        raise EvaluationError(
            f"{cell.defense}: {cell.method} failed on block {block} (samples {batch.indices[0]} .. {batch.indices[-1]} "
            f"of {cell.dataset}): {type(error).__name__}: {error}; finished blocks are kept"
        ) from error
