"""A time limit that holds whatever a method does: methods run in a worker process, and a watchdog kills it.

Nothing inside a process ends a kernel that ignores exceptions and signals, or keeps Python's lock; SIGKILL from outside
does. The worker gets model and plan once, and a batch at a time; it answers with rows. The limit is on all batches of
what the ledger computes in one go: the missing samples of a cell (one method on one unit), or under a budget a slice
of them, then the others. What reaches it is cut off, the worker is killed, and the next cell has a new one. Starting
one (seconds) is not on anybody's time.

The worker computes with the threads and settings of this process, so that its rows are the same ones.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from robustbench_lite.evaluation.flags import Flag
from robustbench_lite.evaluation.methods import Outcome
from robustbench_lite.evaluation.plan import Plan, Task
from robustbench_lite.evaluation.runner import InProcess, TimeLimitError
from robustbench_lite.evaluation.samples import Samples
from robustbench_lite.evaluation.scarcity import ran_out, release
from robustbench_lite.evaluation.subject import Subject

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

    from robustbench_lite.core.threats import Threat

__all__ = ["Watchdog", "WorkerError"]

START = 600.0  # seconds that a worker may take to import and to unpack a model; it is not on a cell's time
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class WorkerError(RuntimeError):
    """A worker process died, or could not be started."""


class _RemoteTracebackError(Exception):
    """The traceback of an error in the worker, as the cause of that error here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(frozen=True)
class _Load:
    """What a worker is given to begin with: model, plan, and how this process computes."""

    subject: Subject
    plan: Plan
    dataset: str
    seed: int
    settings: tuple[Any, ...]


class Watchdog:
    """Runs methods in a worker process, and ends those that take too long.

    Args:
        subject: the model.
        plan: the methods.
        dataset: what records call the data.
        seed: of the evaluation.
        limit: seconds from one `begin` to the next.

    Raises:
        ValueError: the model or a method cannot be sent to another process.
    """

    def __init__(self, subject: Subject, plan: Plan, dataset: str, seed: int, limit: float) -> None:
        self.limit, self._left = limit, limit
        self._places = {task.cell.key: place for place, task in enumerate(plan.tasks(subject, dataset, seed))}
        bare = replace(subject, view=None)  # views may be closures: the worker asks the model for its own
        try:
            self._load = pickle.dumps(_Load(bare, plan, dataset, seed, _settings()))
        except Exception as error:  # picklers of the user's own classes raise anything
            raise ValueError(
                f"a time limit needs a worker process, and {subject.name} or a method cannot be sent there "
                f"({type(error).__name__}: {error}): define its classes at the top level of a module, or give no limit"
            ) from error
        self._process: SpawnProcess | None = None
        self._line: Connection | None = None

    def begin(self) -> None:
        """Say that work on a cell begins, or goes on after something else, and with it its time."""
        self._left = self.limit

    def rows(self, task: Task, batch: Samples, clean: pa.Table | None) -> Outcome:
        """Run a method on a batch."""
        outcome: Outcome = self._ask("rows", self._places[task.cell.key], task.cell, batch, clean)
        return outcome

    def look(self, samples: Samples, seed: int) -> list[Flag]:
        """Take a first look at the model."""
        found: list[Flag] = self._ask("look", samples, seed)
        return found

    def probe(self, samples: Samples, threat: Threat, fallen: set[int], seed: int) -> list[Flag]:
        """Compare attacks with each other."""
        found: list[Flag] = self._ask("probe", samples, threat, fallen, seed)
        return found

    def close(self) -> None:
        """End the worker."""
        if self._line is not None:
            self._line.close()
            self._line = None
        if self._process is not None:
            self._process.kill()  # it is idle, or its answer is no longer wanted
            self._process.join(10)
            self._process = None

    def _ask(self, what: str, *arguments: Any) -> Any:
        """Put a question to the worker.

        Raises:
            TimeLimitError: the cell's time is up.
            WorkerError: the worker died. MemoryError: the system killed it.
            Exception: what the question raised there.
        """
        line = self._line if self._line is not None else self._started()
        start = time.monotonic()
        try:
            line.send_bytes(pickle.dumps((what, arguments)))
            answered = line.poll(max(0.0, self._left))
            answer = pickle.loads(line.recv_bytes()) if answered else None
        except (EOFError, OSError) as error:
            raise self._death() from error
        except BaseException:
            self.close()  # Ctrl-C: whatever the worker answers now belongs to no question
            raise
        self._left -= time.monotonic() - start
        if answer is None:
            self.close()
            raise TimeLimitError(f"cut off after {self.limit:g} s")
        failure, told, value = answer
        if failure is not None:
            raise failure from _RemoteTracebackError(told)
        return value

    def _started(self) -> Connection:
        """Start a worker, and wait until it is ready.

        Raises:
            WorkerError: it does not start.
        """
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, os.getpid()), daemon=True, name="rbl-worker")
        self._process.start()
        theirs.close()
        try:
            self._line.send_bytes(self._load)
            if not self._line.poll(START):
                self.close()
                raise WorkerError(f"the worker process of a time limit did not start within {START:g} s")
            told = pickle.loads(self._line.recv_bytes())
        except (EOFError, OSError) as error:
            code = self._ended()
            raise WorkerError(
                f"the worker process of a time limit did not start (exit status {code}): a script that calls evaluate "
                "does so under if __name__ == '__main__':"
            ) from error
        if told:
            self.close()
            raise WorkerError(f"the worker process of a time limit cannot load the model or a method: {told}")
        return self._line

    def _death(self) -> Exception:
        """Return the error that a dead worker stands for."""
        code = self._ended()
        if code == -signal.SIGKILL:  # it was not this process: the system ends what takes too much memory like that
            return MemoryError("the worker process was killed, as the system does where memory does not suffice")
        how = f"by signal {signal.Signals(-code).name}" if code and code < 0 else f"with status {code}"
        return WorkerError(f"the worker process died {how}")

    def _ended(self) -> int | None:
        process, self._process = self._process, None
        if process is not None:
            process.join(10)
        code = None if process is None else process.exitcode
        self.close()
        return code


def _serve(line: Connection, parent: int) -> None:
    """Answer questions until nobody asks any more: the worker's life."""
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other process's to hear, which then ends this one
    try:
        load: _Load = pickle.loads(line.recv_bytes())
        _set(load.settings)
        subject, told = _with_view(load.subject), ""
        tasks = load.plan.tasks(subject, load.dataset, load.seed)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    line.send_bytes(pickle.dumps(told))
    if told:
        return
    run = InProcess(subject)
    questions: dict[str, Callable[..., Any]] = {
        "rows": lambda place, cell, batch, clean: run.rows(replace(tasks[place], cell=cell), batch, clean),
        "look": run.look,
        "probe": run.probe,
    }
    while True:
        try:
            what, arguments = pickle.loads(line.recv_bytes())
        except EOFError:
            return
        short = False
        try:
            answer = pickle.dumps((None, "", questions[what](*arguments)))
        except Exception as error:
            answer = pickle.dumps((_portable(error), "".join(traceback.format_exception(error)), None))
            short = ran_out(error)
        if short:
            release()
        line.send_bytes(answer)


def _settings() -> tuple[Any, ...]:
    """Return how this process computes, as far as answers depend on it."""
    cudnn = torch.backends.cudnn
    return (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        (cudnn.benchmark, cudnn.deterministic),
    )


def _set(settings: tuple[Any, ...]) -> None:
    threads, dtype, matmul, deterministic, (benchmark, same) = settings
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_float32_matmul_precision(matmul)
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, same


def _with_view(subject: Subject) -> Subject:
    samples, model = subject.view_samples, subject.model
    return subject if samples is None else replace(subject, view=getattr(model, "attack_view")(samples))  # noqa: B009


def _portable(error: Exception) -> Exception:
    """Return an error that survives the way to the other process."""
    try:
        again = pickle.loads(pickle.dumps(error))
    except Exception:  # constructors of the user's own errors raise anything
        again = None
    if type(again) is type(error) and str(again) == str(error):
        return error
    return (MemoryError if ran_out(error) else RuntimeError)(f"{type(error).__name__}: {error}")


def _die_with(parent: int) -> None:
    """Have the system kill this process when the one that started it dies, where it can; a hanging one would stay."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has died meanwhile
        os._exit(1)
