"""The best point found so far for each sample of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from robustbench_lite.core.checks import version_of
from robustbench_lite.core.threats import Threat

__all__ = ["Incumbent"]


class Incumbent:
    """Keeps, for each sample, the best feasible point that was ever offered.

    A success beats a failure. Among successes, and among failures, the higher loss wins, the later one in a tie (a
    saturated cross-entropy is 0 for many iterates, and the last has come farthest); under a minimum-norm threat the
    nearer success wins. With `keep_first`, a sample that has fallen under a fixed budget keeps its first success.

    Attributes:
        points: (B, ...) the best points; the clean ones at first.
        fallen: bool (B,) a feasible success was offered.
        done: bool (B,) nothing better is wanted.
        first_success: int64 (B,) forward passes spent when the sample first fell, -1 where it has not.
    """

    def __init__(self, x: Tensor, threat: Threat, keep_first: bool) -> None:
        self._x, self._threat, self._keep_first = x, threat, keep_first
        self._last: tuple[Tensor, int | None, tuple[Tensor, Threat]] | None = None
        self._minimise = threat.size is None
        self.points = threat.origin(x).clone()
        self.fallen = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.done = self.fallen.clone()
        self.first_success = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
        self._merit = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)

    def offer(self, points: Tensor, rows: Tensor, success: Tensor, value: Tensor, spent: Tensor) -> None:
        """Take in points (n, ...) of `rows`, whether each succeeds, its loss, and the forwards spent so far, all (n,).

        Points outside the threat are ignored, whatever they achieve.
        """
        floor = torch.finfo(torch.float64).min  # no loss is known
        merit = value.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=floor)
        if self._minimise:
            x, threat = self._part(rows)
            merit = torch.where(success, -threat.distance(points, x), merit)
        wanted = self._wanted(rows, success, merit)
        if points.device.type == "cpu":  # a closer look at those alone that may be kept
            chosen = wanted.nonzero().flatten()
            if len(chosen) == 0:
                return
            if len(chosen) < len(rows) // 2:
                points, rows, success, merit, spent, wanted = (
                    part.index_select(0, chosen) for part in (points, rows, success, merit, spent, wanted)
                )
        self._take(points, rows, success, merit, spent, wanted)

    def _wanted(self, rows: Tensor, success: Tensor, merit: Tensor) -> Tensor:
        """Return bool (n,): which points would be kept if they lie in the threat."""
        held = self._merit[rows]
        # Below that no loss is known: the first stays.
        wins = (merit > held) | ((merit == held) & (merit > torch.finfo(merit.dtype).min))
        return torch.where(success == self.fallen[rows], wins, success) & ~self.done[rows]

    def _take(
        self, points: Tensor, rows: Tensor, success: Tensor, merit: Tensor, spent: Tensor, wanted: Tensor
    ) -> None:
        """Keep what lies in the threat of the points that are wanted."""
        x, threat = self._part(rows)
        better = wanted & threat.contains(points, x)
        won = success & better
        self._keep(points, rows, better)
        merit = torch.where(better, merit, self._merit[rows])
        self._merit[rows] = merit
        first = self.first_success[rows]
        self.first_success[rows] = torch.where(won & (first < 0), spent, first)
        self.fallen[rows] |= won
        finished = merit == 0 if self._minimise else torch.full_like(success, self._keep_first)
        self.done[rows] |= self.fallen[rows] & finished

    def _part(self, rows: Tensor) -> tuple[Tensor, Threat]:
        """Return the images and the threat of `rows`; a search often asks about the same rows again."""
        version = version_of(rows)
        if self._last is None or self._last[0] is not rows or version is None or self._last[1] != version:
            self._last = rows, version, (self._x.index_select(0, rows), self._threat.take(rows))
        return self._last[2]

    def _keep(self, points: Tensor, rows: Tensor, better: Tensor) -> None:
        if points.untyped_storage().data_ptr() == self.points.untyped_storage().data_ptr():
            points = points.clone()
        if points.device.type == "cpu":
            chosen = better.nonzero().flatten()
            if len(chosen) == len(rows):
                self.points.index_copy_(0, rows, points)
            else:
                self.points.index_copy_(0, rows[chosen], points.index_select(0, chosen))
        else:  # without a wait for the GPU
            shape = (-1,) + (1,) * (points.ndim - 1)
            self.points[rows] = torch.where(better.reshape(shape), points, self.points[rows])
