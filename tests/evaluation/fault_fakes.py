"""Attacks and models with one fault each; also imported by worker processes."""

from __future__ import annotations

import ctypes
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from evaluation_fakes import Linear, Shift
from torch import Tensor, nn

from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.results import AttackResult


class BadDayError(Exception):
    """An error whose constructor does not take its message alone: it does not survive pickling."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what} because of {why}")


@dataclass(frozen=True)
class Faulty(Shift):
    """A `Shift` with a fault from one dataset index on, as long as a file is there.

    Attributes:
        fault: "hang": sleep in C, every signal blocked and Python's lock held, as a kernel without end. "raise": an
            error. "killed": SIGKILL, as the system does where memory does not suffice, for more than 2 samples. "segv".
        while_there: the file; gone, there is no fault.
    """

    fault: str = "raise"
    at: int = 0
    while_there: str = ""

    def __call__(self, model: Any, x: Tensor, goal: Any, threat: Any, **rest: Any) -> AttackResult:
        if int(rest["indices"].max()) >= self.at and Path(self.while_there).exists():
            self._fail(len(x))
        return super().__call__(model, x, goal, threat, **rest)

    def _fail(self, count: int) -> None:
        if self.fault == "hang":
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            ctypes.PyDLL(None).sleep(1000)
        if self.fault == "raise":
            raise BadDayError("no figure", "the weather")
        if self.fault == "segv":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.fault == "killed" and count > 2:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class NotANumber(Attack):
    """Returns NaN for every image, and for some pixels alone."""

    whole: bool = True

    def supports(self, threat: Any) -> bool:
        return True

    def run(self, oracle: Any, x: Tensor, goal: Any, threat: Any, streams: Any) -> Tensor:
        x_adv = x.clone()
        x_adv[:, :, : (4 if self.whole else 1)] = torch.nan
        return x_adv


SHORTAGES = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
    "python": lambda: MemoryError("Unable to allocate 8.00 PiB"),
}


class Hungry(nn.Module):
    """`Linear`, whose memory suffices for so many images at a time."""

    def __init__(self, most: int, shortage: str = "cuda") -> None:
        super().__init__()
        self.net, self.most, self.shortage = Linear(), most, shortage
        self.largest = 0

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise SHORTAGES[self.shortage]()
        self.largest = max(self.largest, len(x))
        out: Tensor = self.net(x)
        return out
