"""What a piece of work takes: seconds, and the memory that a process or a GPU holds at its peak."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

__all__ = ["Line", "Taken", "measured"]

T = TypeVar("T")

_STATUS, _MARKS = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux: proc_pid_status(5)


@dataclass(frozen=True)
class Taken:
    """What one run over `count` samples took: seconds, and bytes at its peak; None where nothing tells."""

    count: int
    seconds: float
    peak: int | None


@dataclass(frozen=True)
class Line:
    """A quantity as fixed part and part of each sample, from the two largest runs that were made."""

    fixed: float
    each: float

    @classmethod
    def through(cls, points: list[tuple[int, float]]) -> Line:
        """Return the line through the last two points (samples, quantity); through one point and the origin.

        Noise does not make it fall: neither part is negative.
        """
        count, value = points[-1]
        if len(points) == 1:
            return cls(0.0, value / count)
        before, less = points[-2]
        each = max(0.0, (value - less) / (count - before))
        return cls(max(0.0, value - each * count), min(each, value / count))

    def at(self, count: float) -> float:
        """Return the quantity for so many samples in one call."""
        return self.fixed + self.each * count


def measured(work: Callable[[], T], count: int, device: torch.device) -> tuple[T, Taken]:
    """Return what `work` returns, and what it took."""
    _forget_peak(device)
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, Taken(count, time.perf_counter() - start, _peak(device))


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _MARKS.write_text("5")  # the high-water mark starts from what is held now
    except OSError:
        return


def _peak(device: torch.device) -> int | None:
    """Return the bytes of a GPU's allocator, or of this process, at their peak."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
