"""The best point found so far for each sample of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from robustbench_lite.core.checks import version_of
from robustbench_lite.core.rows import put
from robustbench_lite.core.threats import Threat

__all__ = ["UNKNOWN", "Incumbent"]

UNKNOWN = torch.finfo(torch.float64).min  # a failure whose loss nobody knows: the first one stays
LOWEST = torch.nextafter(torch.tensor(UNKNOWN, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)).item()


class Incumbent:
    """Keeps, for each sample, the best feasible point that was ever offered.

    A success beats a failure. Among successes, and among failures, the higher loss wins, the later one in a tie (a
    saturated cross-entropy is 0 for many iterates, and the last has come farthest); under a minimum-norm threat the
    nearer success wins. With `keep_first`, a sample that has fallen under a fixed budget keeps its first success.

    Attributes:
        points: (B, ...) the best points; the clean ones at first.
        fallen: bool (B,) a feasible success was offered.
        done: bool (B,) nothing better is wanted.
        finished: how often `done` may have changed; -1 on a GPU, where to know it would be to wait.
        first_success: int64 (B,) forward passes spent when the sample first fell, -1 where it has not.
    """

    def __init__(self, x: Tensor, threat: Threat, keep_first: bool) -> None:
        self._x, self._threat, self._keep_first = x, threat, keep_first
        self._last: tuple[Tensor, int | None, tuple[Tensor, Threat]] | None = None
        self._minimise = threat.size is None
        self._on_cpu = x.device.type == "cpu"
        self.points = threat.origin(x).clone()
        self.fallen = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.done = self.fallen.clone()
        self.finished = 0 if self._on_cpu else -1
        self.first_success = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
        # What a failure, and what a success, must reach to be kept; NaN where nothing will be.
        self._failure_bar = torch.full((len(x),), UNKNOWN, dtype=torch.float64, device=x.device)
        self._success_bar = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)

    def offer(
        self,
        points: Tensor,
        rows: Tensor,
        success: Tensor,
        value: Tensor,
        spent: Callable[[Tensor], Tensor],
        failures: bool = True,
    ) -> None:
        """Take in points (n, ...) of `rows`, and whether each succeeds and its loss, both (n,).

        Points outside the threat are ignored, whatever they achieve.

        Args:
            points: (n, ...).
            rows: int64 (n,), each at most once.
            success: bool (n,).
            value: the losses (n,), in any floating dtype.
            spent: rows to the forward passes spent on them so far.
            failures: whether points that do not succeed are taken in.
        """
        won = None if self._on_cpu and not bool(success.any()) else success  # a GPU is not waited for
        if not failures:
            if won is None:
                return
            value = torch.where(success, value, torch.nan)
        if self._minimise:
            x, threat = self._part(rows)
            value = torch.where(success, -threat.distance(points, x), value.double())
        wanted: Tensor | None = self._wanted(rows, won, value)
        if self._on_cpu:  # a closer look at those alone that may be kept
            chosen = cast(Tensor, wanted).nonzero().flatten()
            if chosen.numel() == 0:
                return
            if chosen.numel() < rows.numel() // 2:
                points, rows, value = (part.index_select(0, chosen) for part in (points, rows, value))
                won, wanted = None if won is None else won.index_select(0, chosen), None
        x, threat = self._part(rows)
        inside = threat.contains(points, x)
        wanted = inside if wanted is None else wanted & inside
        if self._on_cpu and not bool(wanted.any()):
            return
        self._keep(points, rows, wanted)
        self._raise_bars(rows, won, value.double(), wanted, spent)

    def _wanted(self, rows: Tensor, success: Tensor | None, value: Tensor) -> Tensor:
        """Return bool (n,): which points would be kept if they lie in the threat; no `success`: all are failures."""
        failures = value >= self._failure_bar[rows]
        if success is None:
            return failures
        return torch.where(success, value.nan_to_num(nan=-torch.inf) >= self._success_bar[rows], failures)

    def _raise_bars(
        self,
        rows: Tensor,
        success: Tensor | None,
        value: Tensor,
        kept: Tensor,
        spent: Callable[[Tensor], Tensor],
    ) -> None:
        """Note what was kept, and what from now on must be reached."""
        if success is None:
            self._failure_bar[rows] = torch.where(kept, value.clamp_min(LOWEST), self._failure_bar[rows])
            return
        bar = value.nan_to_num(nan=LOWEST).clamp_min(LOWEST)
        won = success & kept
        self._failure_bar[rows] = torch.where(kept, bar.masked_fill(won, torch.nan), self._failure_bar[rows])
        over = value == 0 if self._minimise else torch.full_like(won, self._keep_first)
        bar = bar.masked_fill(over, torch.nan)
        self._success_bar[rows] = torch.where(won, bar, self._success_bar[rows])
        self.done[rows] |= won & over
        self.fallen[rows] |= won
        first = self.first_success[rows]
        self.first_success[rows] = torch.where(won & (first < 0), spent(rows), first)
        self.finished += self._on_cpu

    def _part(self, rows: Tensor) -> tuple[Tensor, Threat]:
        """Return the images and the threat of `rows`; a search often asks about the same rows again."""
        version = version_of(rows)
        if self._last is None or self._last[0] is not rows or version is None or self._last[1] != version:
            self._last = rows, version, (self._x.index_select(0, rows), self._threat.take(rows))
        return self._last[2]

    def _keep(self, points: Tensor, rows: Tensor, better: Tensor) -> None:
        if points.untyped_storage().data_ptr() == self.points.untyped_storage().data_ptr():
            points = points.clone()
        if self._on_cpu:
            chosen = better.nonzero().flatten()
            if chosen.numel() < rows.numel():
                rows, points = rows[chosen], points.index_select(0, chosen)
            put(self.points, rows, points)
        else:  # without a wait for the GPU
            shape = (-1,) + (1,) * (points.ndim - 1)
            self.points[rows] = torch.where(better.reshape(shape), points, self.points[rows])
