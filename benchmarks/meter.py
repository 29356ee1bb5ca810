"""Time and memory of a piece of work: medians of what is run in turn, and the peak of a fresh process."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

STATUS, MARKS = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux
PASSES = 20  # forward passes whose median is the unit of a round
SPAN = 0.1  # seconds that short work is repeated for


def seconds(work: Callable[[], object], device: str) -> float:
    """Return the seconds that `work` takes: of this process on a CPU, between CUDA events on a GPU."""
    if device == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


@torch.no_grad()
def pass_seconds(model: nn.Module, x: Tensor) -> float:
    """Return the median seconds of a forward pass of the first image, in float32."""
    image = x[:1].float()
    return statistics.median(seconds(lambda: model(image), x.device.type) for _ in range(PASSES))


def steady_seconds(work: Callable[[], object], device: str) -> float:
    """Return the median seconds of a few runs in a row, as many as fit into `SPAN` and as the unit has at most.

    Once is not enough for short work: the unit is measured with warm caches, and so must be what it divides.
    """
    first = seconds(work, device)
    more = min(PASSES, int(SPAN / max(first, 1e-6)))
    return statistics.median([first, *(seconds(work, device) for _ in range(more))])


def rounds(
    works: Mapping[str, Callable[[], object]], unit: Callable[[], float], repeat: int, device: str
) -> dict[str, tuple[float, float]]:
    """Return the median (seconds, multiple of the unit) of each piece of work.

    All take turns, `repeat` times after a round that warms up, and `unit` is measured anew before each.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for number in range(repeat + 1):
        for name, work in works.items():
            one, spent = unit(), steady_seconds(work, device)
            if number:
                taken[name].append((spent, spent / one))
    return {
        name: (statistics.median(s for s, _ in found), statistics.median(u for _, u in found))
        for name, found in taken.items()
    }


def added_memory(work: Callable[[], object], device: str) -> float:
    """Return the bytes by which `work` raised this process's memory at its peak; on a GPU, the device's.

    What an allocator has kept from earlier work would hide what this work takes: measure in a fresh process.
    """
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    MARKS.write_text("5")  # the high-water mark starts from what is held now
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def in_fresh_process(work: Callable[..., Any], *arguments: object) -> Any:
    """Return what a function of a module gives in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def _status(field: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return 1024 * float(line.split()[1])
