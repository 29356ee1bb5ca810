"""The ledger: takes from the store the rows it holds, has the rest computed, and adds it to the store.

A method that fails, or is cut off, costs the samples of its batch their rows, and nothing else: they are left open and
named (`unfinished.py`), and the next run computes them. A batch that does not fit in memory is halved.
"""

from __future__ import annotations

import logging
import traceback

import numpy as np
import pyarrow as pa

from robustbench_lite.core.errors import NotApplicableError
from robustbench_lite.evaluation.budget import Budget, Purse
from robustbench_lite.evaluation.cells import Cell, sample_keys
from robustbench_lite.evaluation.examples import Examples, by_group
from robustbench_lite.evaluation.methods import Outcome
from robustbench_lite.evaluation.plan import Task
from robustbench_lite.evaluation.records import empty_records
from robustbench_lite.evaluation.runner import Runner, TimeLimitError
from robustbench_lite.evaluation.samples import Samples
from robustbench_lite.evaluation.scarcity import ran_out, release
from robustbench_lite.evaluation.store import Store
from robustbench_lite.evaluation.unfinished import BUDGET, ERROR, TIME_LIMIT, Unfinished, joined

__all__ = ["Ledger"]

_LOG = logging.getLogger(__name__)


class Ledger:
    """The rows of one evaluation.

    Args:
        store: where rows are kept; None: nowhere.
        device: where they are computed; it is recorded.
        batch_size: samples in one call of a method, at most.
        runner: runs methods.
        purse: what may be spent; None: anything.

    Attributes:
        unsaved: what could not be written, with the system's reason.
        wrote: whether anything had to be computed and written.
        refused: why a method does not apply to the model, by the key of its cell; it is asked once, and has no rows.
        remarks: what was done otherwise than asked, in words: batches that did not fit in memory.
    """

    def __init__(
        self, store: Store | None, device: str, batch_size: int, runner: Runner, purse: Purse | None = None
    ) -> None:
        self.store, self.device, self.batch_size = store, device, batch_size
        self.runner, self.purse = runner, purse or Purse(Budget())
        self.unsaved: list[str] = []
        self.refused: dict[str, str] = {}
        self.remarks: dict[str, str] = {}
        self.wrote = False
        self._fits: dict[str, int] = {}  # samples that fit in memory, by cell, once they did not
        self._open: dict[tuple[str, int], list[Unfinished]] = {}  # by cell and unit, as all below
        self._fresh: dict[tuple[str, int], list[Examples]] = {}  # examples computed for the units at hand
        self._held: dict[tuple[str, int], list[pa.Table]] = {}  # rows of the units at hand that no file holds

    @property
    def unfinished(self) -> list[Unfinished]:
        """What was left open, one entry for each cell and reason."""
        found: dict[tuple[str, str], Unfinished] = {}
        for (key, _), parts in self._open.items():
            for part in parts if key not in self.refused else ():
                found[key, part.reason] = joined(found.get((key, part.reason)), part)
        return list(found.values())

    def fetch(self, task: Task, part: Samples, clean: pa.Table | None = None) -> pa.Table:
        """Return one row for each sample of a part of one unit, in its order, but for those that are left open.

        There is none of a method that does not apply to the model.

        Args:
            task: the cell, and how to compute its rows.
            part: samples of one unit.
            clean: clean rows, by which an attack spares itself samples that are wrong from the start.

        Raises:
            StoreError: rows must be computed, and the store cannot be written.
        """
        if len(part) == 0:
            return empty_records()
        key, unit = task.cell.key, int(part.unit[0])
        self.settle(key, unit)
        if key in self.refused:
            return empty_records()
        kept = [] if self.store is None else [self.store.rows(task.cell, part.indices)]
        stored = pa.concat_tables([empty_records(), *kept, *self._held.get((key, unit), [])])
        wanted, known = _keys(part), set(sample_keys(stored))
        missing = np.array([place for place, name in enumerate(wanted) if name not in known], dtype=np.int64)
        if len(missing):
            if len(stored):
                self.purse.learn(key, stored.filter(pa.array(np.isin(stored.column("index").to_numpy(), part.indices))))
            try:
                left = part.take(missing) if len(missing) < len(part) else part  # each batch is a copy in any case
                stored = pa.concat_tables([stored, *self._compute(task, left, clean)])
            except NotApplicableError as error:
                self.refused[key] = str(error)
                return empty_records()
        held = sample_keys(stored)
        if held == wanted:
            return stored
        places = {name: place for place, name in enumerate(held)}
        return stored.take(pa.array([places[name] for name in wanted if name in places], type=pa.int64()))

    def example(self, cell: Cell, sample: tuple[int, str, int]) -> Examples | None:
        """Return the adversarial example of one (index, hash, label) of a unit at hand; None where there is none."""
        index = sample[0]
        fresh = [examples for (key, _), held in self._fresh.items() if key == cell.key for examples in held]
        stored = [] if self.store is None else self.store.examples(cell, sample)
        for examples in [*fresh, *stored]:
            found = (examples.index == index).nonzero()[0]
            if len(found):
                return examples.take(found[:1])
        return None

    def forget(self, unit: int) -> None:
        """Drop what is held of a unit that is finished."""
        self._fresh = {place: held for place, held in self._fresh.items() if place[1] != unit}
        self._held = {place: held for place, held in self._held.items() if place[1] != unit}

    def settle(self, key: str, unit: int) -> None:
        """Forget what was left open: it is asked again now, or there is nothing left to ask."""
        self._open.pop((key, unit), None)

    def leave(self, key: str, unit: int, part: Unfinished) -> None:
        """Note what is left open."""
        self._open.setdefault((key, unit), []).append(part)
        if part.reason != BUDGET:
            _LOG.warning("%s", part)

    def _compute(self, task: Task, part: Samples, clean: pa.Table | None) -> list[pa.Table]:
        """Compute batch after batch, and keep what was computed, however it ends."""
        if self.store is not None and not self.wrote:
            self.store.require_writable()
            self.wrote = True
        self.runner.begin()
        found: list[Outcome] = []
        unit, start = int(part.unit[0]), 0
        ends = np.append(np.flatnonzero(np.diff(part.batch)) + 1, len(part))
        try:
            while start < len(part):
                size = self._size(task.cell, int(ends[np.searchsorted(ends, start, side="right")]) - start)
                batch = part.take(np.arange(start, start + size))
                if size == 0:
                    self._leave(task.cell, unit, len(part) - start, BUDGET, str(self.purse))
                    break
                try:
                    found.append(self.runner.rows(task, batch, clean))
                    self.purse.pay(task.cell.key, found[-1][0])
                    start += size
                    continue
                except TimeLimitError as error:
                    self._leave(task.cell, unit, len(part) - start, TIME_LIMIT, str(error))
                    break
                except Exception as error:
                    short = ran_out(error)
                    start += self._failed(task.cell, batch, len(part) - start, error)
                if short:
                    release()  # now that the error is gone, which holds the frames of the attempt
        finally:
            tables = [table for table, _ in found]
            self._keep(task.cell, unit, tables, Examples.join([kept for _, kept in found if kept is not None]))
        return tables

    def _size(self, cell: Cell, most: int) -> int:
        """Return the samples of the next batch; clean answers are given whatever the budget."""
        size = min(most, self._fits.get(cell.key, self.batch_size))
        return size if cell.kind == "clean" else self.purse.affords(cell.key, size)

    def _failed(self, cell: Cell, batch: Samples, left: int, error: Exception) -> int:
        """Return how many samples are done with after an error.

        None where a smaller batch may fit in memory; all that are left where one sample does not.

        Raises:
            NotApplicableError: the method does not apply to the model.
        """
        short = ran_out(error)
        if short and len(batch) > 1:
            self._fits[cell.key] = size = (len(batch) + 1) // 2
            few = f"{size} sample{'s' * (size > 1)} at a time"
            self.remarks[cell.key] = f"{cell.method}: {few}, more did not fit in memory"
            return 0
        if not short and isinstance(error, NotApplicableError):
            raise error
        named = f"{'out of memory with one sample: ' if short else ''}{type(error).__name__}: {error}"
        done = left if short else len(batch)
        where = f"samples {batch.indices[0]} .. {batch.indices[-1]} of {cell.dataset}"
        text = f"{cell.defense}: {cell.method} failed on {where}: {named}"
        self._leave(cell, int(batch.unit[0]), done, ERROR, text, "".join(traceback.format_exception(error)))
        return done

    def _leave(self, cell: Cell, unit: int, samples: int, reason: str, detail: str, told: str = "") -> None:
        part = Unfinished(cell.threat, cell.eps, cell.kind, cell.method, samples, reason, detail, told)
        self.leave(cell.key, unit, part)

    def _keep(self, cell: Cell, unit: int, tables: list[pa.Table], examples: Examples | None) -> None:
        """Write the rows. A full disk costs this cell its files, and nothing else: the evaluation goes on."""
        if not tables:
            return
        rows = pa.concat_tables(tables)
        if examples is not None:
            self._fresh.setdefault((cell.key, unit), []).append(examples)
        if self.store is None:
            self._held.setdefault((cell.key, unit), []).append(rows)
            return
        for own, found in by_group(rows, examples):
            try:
                self.store.write(cell, own, found, self.device)
            except OSError as error:
                indices = own.column("index").to_numpy()
                where = f"samples {indices.min()} .. {indices.max()}"
                self.unsaved.append(f"{cell.method} ({cell.threat or 'clean'}), {where}: {error}")
                self._held.setdefault((cell.key, unit), []).append(own)


def _keys(part: Samples) -> list[tuple[int, str, int]]:
    return list(zip(part.indices.tolist(), part.hashes, part.targets.tolist(), strict=True))
