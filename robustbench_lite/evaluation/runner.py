"""Who runs methods: this process itself, or (`watchdog.py`) a worker process under a time limit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import pyarrow as pa

from robustbench_lite.evaluation.first_look import LOOKED_AT, first_look
from robustbench_lite.evaluation.flags import Flag
from robustbench_lite.evaluation.methods import Outcome, sparing
from robustbench_lite.evaluation.plan import Task
from robustbench_lite.evaluation.samples import Samples
from robustbench_lite.evaluation.scarcity import fitting
from robustbench_lite.evaluation.subject import Subject

if TYPE_CHECKING:
    from robustbench_lite.core.threats import Threat

__all__ = ["InProcess", "Runner", "TimeLimitError"]


class TimeLimitError(Exception):
    """A cell was cut off."""


class Runner(Protocol):
    """Asks the model, and runs methods.

    Each question may raise `TimeLimitError`, and what the model or the method raises.
    """

    def begin(self) -> None:
        """Say that work on a cell begins, or goes on after something else, and with it its time."""

    def rows(self, task: Task, batch: Samples, clean: pa.Table | None) -> Outcome:
        """Run a method on a batch; `clean`: rows by which an attack spares itself what is wrong from the start."""

    def look(self, samples: Samples, seed: int) -> list[Flag]:
        """Take a first look at the model; on fewer images where memory does not suffice."""

    def probe(self, samples: Samples, threat: Threat, fallen: set[int], seed: int) -> list[Flag]:
        """Compare attacks with each other."""

    def close(self) -> None:
        """End what was started."""


class InProcess:
    """Runs methods in this process.

    Args:
        subject: the model.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def begin(self) -> None:
        """Nothing limits a cell's time here."""

    def rows(self, task: Task, batch: Samples, clean: pa.Table | None) -> Outcome:
        """Run a method on a batch."""
        run = task.run if clean is None else sparing(task.run, self._subject, clean)
        return run(task.cell, batch)

    def look(self, samples: Samples, seed: int) -> list[Flag]:
        """Take a first look at the model."""
        return fitting(lambda count: first_look(self._subject, samples, seed, count), LOOKED_AT)

    def probe(self, samples: Samples, threat: Threat, fallen: set[int], seed: int) -> list[Flag]:
        """Compare attacks with each other."""
        from robustbench_lite.evaluation.probe import probe  # imports attacks that few evaluations need

        return probe(self._subject, samples, threat, fallen, seed)

    def close(self) -> None:
        """Nothing was started."""
