"""Lines around an activation: what linear bounds put in the place of a function that is not linear.

Over an interval l <= t <= u every activation f is held between two lines,

    lower_slope * t + lower_shift <= f(t) <= upper_slope * t + upper_shift,

one pair for each neuron. A lower bound of a * f(t) takes the lower line where a > 0 and the upper line where a < 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Lines"]


@dataclass(frozen=True, eq=False)
class Lines:
    """Two lines a neuron; all tensors have the shape (B, ...) of the activation's input.

    Attributes:
        lower_slope: of the line below.
        lower_shift: of the line below.
        upper_slope: of the line above.
        upper_shift: of the line above.
        free: bool, or 1 and 0, where every slope between `least` and `most` makes a line through the origin below f:
            there an optimiser may choose the lower slope of each row of bounds (`AlphaCROWN`). None: nowhere.
        least: smallest such slope.
        most: largest such slope.
    """

    lower_slope: Tensor
    lower_shift: Tensor
    upper_slope: Tensor
    upper_shift: Tensor
    free: Tensor | None = None
    least: float = 0.0
    most: float = 1.0

    @property
    def exact(self) -> Tensor:
        """Where both lines are the same, bool: tighter bounds of the input gain nothing there."""
        return (self.lower_slope == self.upper_slope) & (self.lower_shift == self.upper_shift)

    def chosen(self, slope: Tensor) -> Lines:
        """Return the lines with these lower slopes where they are free."""
        assert self.free is not None
        return replace(
            self, lower_slope=torch.lerp(self.lower_slope, slope, self.free.to(slope.dtype))
        )  # exact at 0, 1

    def take(self, keep: Tensor) -> Lines:
        """Return the lines of some samples, which may repeat."""
        names = ("lower_slope", "lower_shift", "upper_slope", "upper_shift")
        free = None if self.free is None else self.free[keep]
        return replace(self, **{name: getattr(self, name)[keep] for name in names}, free=free)
