"""Rotations and translations by exhaustive search: three parameters are few enough to try them all.

Threat: rotations with translations. Access: scores.
Source: Engstrom, Tran, Tsipras, Schmidt and Madry 2017, "Exploring the Landscape of Spatial Robustness" (1712.02779);
there, too, first-order attacks on these parameters lose to the grid.
Departures: grid points are tried from the outermost inwards, in blocks, and a sample leaves after the block in which it
falls (the original tries all, and takes the one with the largest loss); the "black canvas", which pads images first so
that nothing leaves them, is a matter of the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.goals import Goal
from robustbench_lite.core.losses import cross_entropy
from robustbench_lite.core.models import labels_of
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.spatial import RotationTranslation
from robustbench_lite.core.threats import Threat

__all__ = ["RotationTranslationGrid"]

ALONE = 16  # points asked one by one: most samples fall at the corners of the threat
TOGETHER = 32  # points in one question after these, judged by their worst
IMAGES = 512  # images in one such question on a CPU: many more leave its cache


@dataclass(frozen=True)
class RotationTranslationGrid(Attack):
    """The worst of all grid points, or of a few uniform draws.

    Attributes:
        angles: angles of the grid, evenly spaced over the threat's; 1: no rotation.
        shifts: shifts along each axis, evenly spaced over the threat's; 1: no shift.
        worst_of: try this many uniform draws, each sample its own, in place of the grid; None: the grid.

    Raises:
        ValueError: a number that is not whole or below 1.
    """

    angles: int = 31
    shifts: int = 5
    worst_of: int | None = None

    def __post_init__(self) -> None:
        for name in ("angles", "shifts", "worst_of"):
            value = getattr(self, name)
            if (value is not None or name != "worst_of") and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")

    @property
    def access(self) -> Access:
        """Scores: among failures the largest loss is kept."""
        return Access.SCORES

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is one of rotations and translations."""
        return isinstance(threat, RotationTranslation)

    def points(self, x: Tensor, threat: RotationTranslation) -> Tensor:
        """Return the grid, (angles * shifts^2, 3), the largest share of the budget (in l2) first."""
        limits = threat.limits(x)
        counts = (self.angles, self.shifts, self.shifts)
        axes = [
            torch.linspace(-1, 1, n, dtype=x.dtype, device=x.device) if n > 1 and limit > 0 else x.new_zeros(1)
            for n, limit in zip(counts, limits.tolist(), strict=True)
        ]
        grid = torch.cartesian_prod(*axes)
        # Rounded, so that points that mirror each other tie on every machine.
        order = grid.norm(dim=1).mul(1e4).round().argsort(descending=True, stable=True)
        return grid[order] * limits

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Ask about one block of points after the other, for the samples that still stand."""
        assert isinstance(threat, RotationTranslation)
        grid = self.points(x, threat) if self.worst_of is None else None
        for block in _blocks(oracle, cast(int, self.worst_of) if grid is None else len(grid)):
            size, rows = block.stop - block.start, oracle.standing(oracle.judge_cost)
            if len(rows) == 0:
                break
            if grid is None:
                images, own = x[rows], streams.take(rows)
                points = torch.stack([threat.random_point(images, own) for _ in range(size)], dim=1)
            else:
                points = grid[block].expand(len(rows), -1, -1)
            if size == 1:
                oracle.judge(points[:, 0], rows, cross_entropy)
                continue
            able = torch.zeros_like(rows, dtype=torch.bool)
            able[oracle.still(rows, size + oracle.judge_cost)] = True
            if able.any():
                oracle.judge(_worst(oracle, rows[able], points[able]), rows[able], cross_entropy)
            _spend_the_rest(oracle, rows[~able], points[~able])
        return oracle.best


def _spend_the_rest(oracle: Oracle, rows: Tensor, points: Tensor) -> None:
    """Try the points (n, k, 3) one by one on samples that cannot pay for all of them at once."""
    for point in points.unbind(1):
        keep = oracle.still(rows, oracle.judge_cost)
        if len(keep) == 0:
            return
        oracle.judge(point[keep], rows[keep], cross_entropy)


def _blocks(oracle: Oracle, count: int) -> Iterator[slice]:
    """Cut the points into questions. Scores tell the worst of a block only where they are what is deployed."""
    plain = oracle.scores_cost == 1 and not oracle.stochastic
    start = 0
    while start < count:
        stop = min(count, start + (TOGETHER if plain and start >= ALONE else 1))
        yield slice(start, stop)
        start = stop


def _worst(oracle: Oracle, rows: Tensor, points: Tensor) -> Tensor:
    """Return, of the points (n, k, 3), one for each row, (n, 3): the success with the largest loss, or the failure."""
    count = points.shape[1]
    images = min(oracle.capacity, IMAGES) if rows.device.type == "cpu" else oracle.capacity
    parts = torch.split(torch.arange(len(rows), device=rows.device), max(1, images // count))
    worst = []
    for part in parts:
        again = rows[part].repeat_interleave(count)
        logits = oracle.scores(points[part].flatten(0, 1), again, candidate=False)
        goal = oracle.goal.take(again)
        loss = cross_entropy(logits, goal).double().nan_to_num(nan=torch.finfo(torch.float64).min).reshape(-1, count)
        success = goal.achieved(labels_of(logits)).reshape(-1, count)
        worst.append(loss.masked_fill(~success & success.any(dim=1, keepdim=True), -torch.inf).argmax(dim=1))
    return points[torch.arange(len(rows), device=rows.device), torch.cat(worst)]
