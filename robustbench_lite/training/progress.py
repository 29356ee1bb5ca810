"""The progress bar of a training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(show: bool, done: int, total: int) -> Iterator[Callable[..., None]]:
    """Yield `update(completed=steps, description=text)` of a bar on the standard error, or of none.

    Args:
        show: whether there is a bar at all.
        done: steps that lie behind already (a resumed run).
        total: steps of the whole training.
    """
    if not show:
        yield lambda **_: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=total, completed=done)
        yield lambda **news: progress.update(task, **news)
