"""Learning-rate schedules: pure functions of progress, so that a resumed run meets the same rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from robustbench_lite.core.errors import lookup

__all__ = ["Constant", "Cosine", "OneCycle", "Schedule", "Steps", "schedule_named"]

Schedule = Callable[[float], float]
"""From progress in [0, 1] to the factor of the learning rate."""


@dataclass(frozen=True)
class Constant:
    """The learning rate as it is."""

    def __call__(self, progress: float) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True)
class OneCycle:
    """A linear rise from 0 to the full rate, then a linear fall to 0.

    Args:
        warmup: share of the training that the rise takes.
    """

    warmup: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the training in [0, 1), got {self.warmup:g}")

    def __call__(self, progress: float) -> float:
        """Return the factor.

        >>> [OneCycle(0.5)(t) for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
        """
        return progress / self.warmup if progress < self.warmup else (1 - progress) / (1 - self.warmup)


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from the full rate to 0."""

    def __call__(self, progress: float) -> float:
        """Return the factor."""
        return (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Steps:
    """The rate is multiplied by `factor` at each milestone.

    Args:
        milestones: shares of the training, rising; Madry's CIFAR-10 run has (0.5, 0.75), Gowal's IBP (0.25, 0.42).
        factor: what each milestone multiplies the rate by.
    """

    milestones: Sequence[float] = (0.5, 0.75)
    factor: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(float(at) for at in self.milestones))
        if list(self.milestones) != sorted(self.milestones) or any(not 0 < at < 1 for at in self.milestones):
            raise ValueError(f"milestones are rising shares of the training in (0, 1), got {self.milestones}")

    def __call__(self, progress: float) -> float:
        """Return `factor` to the number of milestones passed."""
        return float(self.factor ** sum(progress >= at for at in self.milestones))


_NAMED: dict[str, Schedule] = {"constant": Constant(), "cosine": Cosine(), "one_cycle": OneCycle(), "steps": Steps()}


def schedule_named(schedule: str | Schedule) -> Schedule:
    """Return the schedule of this name, or the schedule itself.

    Raises:
        ValueError: no schedule has this name.
    """
    return lookup(schedule, _NAMED, "learning-rate schedule") if isinstance(schedule, str) else schedule
