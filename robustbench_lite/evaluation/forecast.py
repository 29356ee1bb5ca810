"""A forecast: what an evaluation would cost, from a short calibration. Nothing is kept, and the store is only read.

Each cell that has rows to compute is run on a few samples, drawn by seed, in growing numbers: seconds and memory are
taken as a fixed part of each call and a part of each sample, passes as means. In a cascade what falls or is proven
there tells the share of the samples that the next method meets. Errors of a forecast: an attack's steps go on until the
last sample of its batch has fallen, so that a large batch may take more steps than a small one; a share measured on 64
samples is off by its square root; and whatever else the machine does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from robustbench_lite.core.errors import NotApplicableError
from robustbench_lite.core.threats import Threat
from robustbench_lite.evaluation.meter import Line, Taken, measured
from robustbench_lite.evaluation.plan import Plan, Task, with_own
from robustbench_lite.evaluation.samples import Samples, as_samples
from robustbench_lite.evaluation.store import Store
from robustbench_lite.evaluation.subject import Subject

if TYPE_CHECKING:
    from robustbench_lite.attacks.base import Attack
    from robustbench_lite.certify.base import Certifier
    from robustbench_lite.data.base import Dataset

__all__ = ["Expected", "Forecast", "forecast"]

SIZES = (1, 4, 16, 64)  # samples of the calibration runs
CELL_SECONDS = 20.0  # after which a cell's calibration goes on to no larger size
DEAR = 60.0  # seconds of a first run, of one sample, that is not made again: all there is to go by
_Mask = np.ndarray[Any, np.dtype[np.bool_]]
_NAME = ["index", "sample_hash", "label"]


@dataclass(frozen=True)
class Expected:
    """What one cell, over all its units, is expected to cost.

    Attributes:
        threat: the threat's name; None for clean answers.
        eps: its budget.
        method: the method's name in tables.
        stored: samples whose rows the store already holds.
        missing: samples to compute; in a cascade an estimate.
        forwards: forward passes over all of them.
        backwards: backward passes.
        minutes: time.
        peak: bytes that the process, or the GPU, holds at its peak; None where nothing tells.
        applies: whether the method has anything to say about the model.
    """

    threat: str | None
    eps: float | None
    method: str
    stored: int
    missing: int
    forwards: int = 0
    backwards: int = 0
    minutes: float = 0.0
    peak: int | None = None
    applies: bool = True


@dataclass(frozen=True)
class Forecast:
    """What an evaluation is expected to cost.

    Attributes:
        cells: in the order of the plan.
        device: where it was calibrated.
        samples: that the evaluation is about.
        seconds: that the calibration took.
    """

    cells: list[Expected]
    device: str
    samples: int
    seconds: float

    @property
    def total(self) -> Expected:
        """All cells together; the peak is the highest."""
        peaks = [cell.peak for cell in self.cells if cell.peak is not None]
        sums = {name: sum(getattr(cell, name) for cell in self.cells) for name in ("stored", "missing")}
        sums |= {name: sum(getattr(cell, name) for cell in self.cells) for name in ("forwards", "backwards")}
        minutes = sum(cell.minutes for cell in self.cells)
        return Expected(None, None, "total", **sums, minutes=minutes, peak=max(peaks, default=None))


def forecast(
    model: Any,
    data: Dataset | tuple[Any, Any],
    threat: Threat | Sequence[Threat],
    attacks: Iterable[Attack] = (),
    certifiers: Iterable[Certifier] = (),
    *,
    store: Path | str | None = None,
    seed: int = 0,
    mode: str = "full",
    audit: float = 0.05,
    adaptive: bool = True,
    name: str | None = None,
    batch_size: int = 250,
    device: str = "auto",
    max_queries: int | None = None,
    precision: str = "auto",
) -> Forecast:
    """Return what `evaluate` with these arguments would cost; the probe of `probed=True` is not in it.

    Raises:
        TypeError, ValueError: as `evaluate`. Exception: what a method raises.
    """
    start = time.perf_counter()
    threats = [threat] if isinstance(threat, Threat) else list(threat)
    given = list(attacks), list(certifiers)
    methods = with_own(model, threats, *given) if adaptive else given
    plan = Plan.of(threats, *methods, max_queries)
    samples = as_samples(data, plan.bounds).in_batches(batch_size)
    subject = Subject.of(model, name, device, precision)
    there = Store(store) if store is not None and Path(store).is_dir() else None
    drawn = np.argsort(samples.lots("forecast", seed))[: SIZES[-1]]
    few = samples.take(drawn[np.argsort(samples.indices[drawn])])
    course = _Course(few, audit if mode == "cascade" else None, seed)
    tasks = plan.tasks(subject, samples.name, seed)
    if mode == "cascade":
        tasks = [tasks[0], *sorted(tasks[1:], key=lambda task: (task.threat, task.stage))]
    cells = [_expected(task, samples, there, course, subject, batch_size) for task in tasks]
    return Forecast(cells, str(subject.device), len(samples), time.perf_counter() - start)


class _Course:
    """What became of the few samples under each threat so far: whom the next method meets."""

    def __init__(self, few: Samples, audit: float | None, seed: int) -> None:
        self.few, self._audit = few, audit
        self._drawn = few.lots("audit", seed) < (audit or 0.0)
        self._correct = np.ones(len(few), dtype=bool)
        self._settled: dict[int, tuple[_Mask, _Mask]] = {}  # proven, fallen, by threat

    def meets(self, task: Task) -> _Mask:
        """Return which of the few a method meets, bool (n,); the first certifier of a threat meets all."""
        first = task.threat not in self._settled and task.cell.kind == "certifier"
        if task.threat < 0 or self._audit is None or first:
            return np.ones(len(self.few), dtype=bool)
        proven, fallen = self._of(task)
        if task.cell.kind == "attack":
            return self._correct & ~fallen & (self._drawn | ~proven)
        return self._correct & ~proven & (~fallen | (task.stage == 0))

    def learn(self, task: Task, rows: pa.Table) -> None:
        """Take in the rows of a method; samples that it was not run on count as standing."""
        places = np.searchsorted(self.few.indices, rows.column("index").to_numpy())
        if task.threat < 0:
            self._correct[places] = _true(rows, "correct")
        elif task.cell.kind == "attack":
            self._of(task)[1][places] |= _true(rows, "success")
        else:
            sure = rows.column("certificate").to_numpy(zero_copy_only=False) == "deterministic"
            self._of(task)[0][places] |= _true(rows, "certified") & sure

    def _of(self, task: Task) -> tuple[_Mask, _Mask]:
        nobody = np.zeros(len(self.few), dtype=bool)
        return self._settled.setdefault(task.threat, (nobody, nobody.copy()))


def _expected(
    task: Task, samples: Samples, store: Store | None, course: _Course, subject: Subject, batch_size: int
) -> Expected:
    """Run a cell on the few samples that it meets, and return what its missing rows will take."""
    cell, known = task.cell, _known(task, samples, store)
    met = course.meets(task)
    if not met.any():
        return Expected(cell.threat, cell.eps, cell.method, int(known.sum()), 0)
    try:
        rows, taken = _calibrated(task, course.few.take(met), subject)
    except NotApplicableError:
        return Expected(cell.threat, cell.eps, cell.method, 0, 0, applies=False)
    course.learn(task, rows)
    sizes = _batches(samples.take(~known), float(met.mean()), batch_size)
    time_of = Line.through([(run.count, run.seconds) for run in taken])
    peaks = [(run.count, float(run.peak)) for run in taken if run.peak is not None]
    return Expected(
        cell.threat,
        cell.eps,
        cell.method,
        int(known.sum()),
        math.ceil(sum(sizes)),
        round(_mean(rows, "forwards") * sum(sizes)),
        round(_mean(rows, "backwards") * sum(sizes)),
        sum(time_of.at(size) for size in sizes) / 60,
        round(Line.through(peaks).at(max(sizes))) if len(peaks) > 1 and sizes else None,
    )


def _calibrated(task: Task, part: Samples, subject: Subject) -> tuple[pa.Table, list[Taken]]:
    """Return the rows of the largest run, and what each run took.

    The first one imports, traces and compiles what later ones find done: it counts only if it was dear.
    """

    def run(size: int) -> tuple[pa.Table, Taken]:
        (rows, _), taken = measured(partial(task.run, task.cell, part.take(np.arange(size))), size, subject.device)
        return rows, taken

    rows, first = run(1)
    taken: list[Taken] = []
    start = time.perf_counter()
    for size in dict.fromkeys(min(size, len(part)) for size in SIZES):
        if first.seconds > DEAR or time.perf_counter() - start > CELL_SECONDS:
            break
        rows, last = run(size)
        taken.append(last)
    return rows, taken or [first]


def _known(task: Task, samples: Samples, store: Store | None) -> _Mask:
    """Return which samples have a row in the store, bool (N,)."""
    if store is None or not (store.root / "cells" / task.cell.key).is_dir():
        return np.zeros(len(samples), dtype=bool)
    table = store.columns(task.cell.key, _NAME)
    stored = set(zip(*(table.column(name).to_pylist() for name in _NAME), strict=True))
    names = zip(samples.indices.tolist(), samples.hashes, samples.targets.tolist(), strict=True)
    return np.array([name in stored for name in names], dtype=bool)


def _batches(samples: Samples, share: float, batch_size: int) -> list[float]:
    """Return the expected sizes of the batches: those of the samples, or of the share of each unit that is met."""
    if share == 1:
        return [float(count) for count in np.unique(samples.batch, return_counts=True)[1]]
    met = [share * int(count) for count in np.unique(samples.unit, return_counts=True)[1]]
    sizes = [[float(batch_size)] * int(count // batch_size) + [count % batch_size] for count in met]
    return [size for unit in sizes for size in unit if size > 0]


def _mean(rows: pa.Table, column: str) -> float:
    return float(pc.sum(rows.column(column)).as_py() or 0.0) / len(rows)


def _true(rows: pa.Table, column: str) -> _Mask:
    mask: _Mask = rows.column(column).to_numpy(zero_copy_only=False).astype(bool)
    return mask
