"""When Auto-PGD changes its step, and where it then starts from. One small class for each of its two versions."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Halving", "Sparsity", "checkpoints"]


def checkpoints(steps: int) -> list[int]:
    """Return the iterations w_j = ceil(p_j * steps) at which the step size is looked at.

    p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06). Counted in whole hundredths: the binary
    0.22 + 0.19 is above 0.41, and its ceiling would be one iteration late.
    """
    marks, last, now = [], 0, 22
    while now < 100:
        marks.append(-(-now * steps // 100))
        last, now = now, now + max(now - last - 3, 6)
    return sorted({mark for mark in marks if mark < steps})


class Halving:
    """Step sizes for linf and l2: each sample's is halved at a checkpoint where its search stalls.

    It stalls when (1) fewer than `rho` of the steps since the last checkpoint raised the loss, or (2) neither the step
    size nor the best loss has changed since then.

    Args:
        size: (n, 1, 1, 1) first step size.
        steps: length of the run.
        rho: share of the steps that must raise the loss.

    Attributes:
        size: (n, 1, 1, 1) step size now.
    """

    def __init__(self, size: Tensor, steps: int, rho: float) -> None:
        self.size, self.rho = size, rho
        self._marks, self._last = checkpoints(steps), 0
        self._rises = torch.zeros(len(size), dtype=torch.int64, device=size.device)
        self._halved = torch.zeros(len(size), dtype=torch.bool, device=size.device)
        self._best: Tensor | None = None  # the best loss at the last checkpoint

    def record(self, rose: Tensor | None, best: Tensor, step: int) -> Tensor | None:
        """Take in one evaluated iterate; return bool (n,), who was halved and restarts from its best, or None.

        Args:
            rose: bool (n,) whether its loss is above that of the point the step came from; None for the start.
            best: (n,) the best loss so far.
            step: its number, 0 for the start.
        """
        if rose is not None:
            self._rises += rose
        if self._best is None:
            self._best = best
        if step not in self._marks:
            return None
        stalled = self._rises < self.rho * (step - self._last)
        stalled |= ~self._halved & (best <= self._best)
        self.size = torch.where(stalled.reshape(-1, 1, 1, 1), self.size / 2, self.size)
        self._last, self._halved, self._best = step, stalled, best
        self._rises = torch.zeros_like(self._rises)
        return stalled

    def take(self, keep: Tensor) -> None:
        """Keep these samples alone."""
        self.size, self._rises, self._halved = self.size[keep], self._rises[keep], self._halved[keep]
        self._best = None if self._best is None else self._best[keep]


class Sparsity:
    """Steps for l1: how many coordinates one moves, and how far, follow the sparsity of the best point so far.

    Every `0.04 * steps` iterations (rounded down, at least one) the number of coordinates becomes that which the best
    change uses, over 1.5.
    A sample whose best change became sparser (below 95 %) starts again from it with the longest step; the steps of
    the others are divided by 1.5, down to a tenth of the longest.

    Args:
        size: (n, 1, 1, 1) first and longest step size.
        steps: length of the run.
        coordinates: coordinates of an image.
        used: int64 (n,) coordinates that the start changes, where it is the outcome of another search; None: a
            step moves a fifth of the coordinates at first.

    Attributes:
        size: (n, 1, 1, 1) step size now.
        moved: int64 (n,) coordinates that a step moves.
    """

    def __init__(self, size: Tensor, steps: int, coordinates: int, used: Tensor | None = None) -> None:
        self.size, self._longest, self._period = size, size, max(4 * steps // 100, 1)
        everything = torch.full((len(size),), coordinates, dtype=torch.int64, device=size.device)
        self._used = everything if used is None else used
        self.moved = (everything * 0.2 if used is None else used / 1.5).long().clamp_min(1)

    def record(self, best: Tensor, x: Tensor, step: int) -> Tensor | None:
        """Take in the best points (n, C, H, W) after step number `step`; return bool (n,), who restarts from them."""
        if step == 0 or step % self._period:
            return None
        used = (best != x).flatten(1).sum(dim=1)
        sparser = used < 0.95 * self._used
        shorter = torch.maximum(self.size / 1.5, self._longest / 10)
        self.size = torch.where(sparser.reshape(-1, 1, 1, 1), self._longest, shorter)
        self.moved, self._used = (used / 1.5).long().clamp_min(1), used
        return sparser

    def take(self, keep: Tensor) -> None:
        """Keep these samples alone."""
        self.size, self._longest = self.size[keep], self._longest[keep]
        self.moved, self._used = self.moved[keep], self._used[keep]
