"""How Auto-PGD moves: with momentum in linf and l2, by sparse steps in l1. Mutable state of one run on one batch."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from robustbench_lite.attacks._apgd_schedule import Halving, Sparsity
from robustbench_lite.core.norms import stuck
from robustbench_lite.core.threats import Lp

__all__ = ["Momentum", "Rule", "Sparse", "rule_for"]

MOMENTUM = 0.75  # weight of the new step; the rest is the last change


class Rule(Protocol):
    """Moves points, and says which samples start again from their best one."""

    def move(self, points: Tensor, gradient: Tensor) -> Tensor:
        """Return the next points (n, C, H, W), inside the threat."""

    def look(self, step: int, rose: Tensor | None, best: Tensor, best_points: Tensor) -> Tensor | None:
        """Take in what the evaluation of iterate `step` showed; return bool (n,), who restarts from its best."""

    def take(self, keep: Tensor) -> None:
        """Keep these samples alone."""


def rule_for(threat: Lp, x: Tensor, start: Tensor, steps: int, rho: float, resumed: bool) -> Rule:
    """Return the rule of the threat's norm; `resumed` where the start is the outcome of another search."""
    if threat.norm == "l1":
        used = (start != x).flatten(1).sum(dim=1) if resumed else None
        return Sparse(threat, x, Sparsity(_length(threat, x), steps, x.shape[1:].numel(), used))
    return Momentum(threat, x, Halving(2 * _length(threat, x), steps, rho))


def _length(threat: Lp, x: Tensor) -> Tensor:
    return threat.radius(x).expand(len(x), 1, 1, 1)


class Momentum:
    """z = P(x_k + size * steepest), x_{k+1} = P(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1})); first step: x_1 = z."""

    def __init__(self, threat: Lp, x: Tensor, schedule: Halving) -> None:
        self._threat, self._x, self._schedule = threat, x, schedule
        self._previous: Tensor | None = None
        self._corners: tuple[Tensor, Tensor] | None = None
        if threat.norm == "linf":  # there the threat is a box: two corners, projected once, make P a single clamp
            span = threat.bounds[1] - threat.bounds[0]
            self._corners = threat.project(x - span, x), threat.project(x + span, x)

    def move(self, points: Tensor, gradient: Tensor) -> Tensor:
        """Return the next points (n, C, H, W), inside the threat."""
        ahead = self._project(torch.addcmul(points, self._threat.steepest(gradient), self._schedule.size))
        if self._previous is not None:
            ahead = ahead.lerp_(points, 1 - MOMENTUM).add_(points - self._previous, alpha=1 - MOMENTUM)
            ahead = self._project(ahead)
        self._previous = points
        return ahead

    def look(self, step: int, rose: Tensor | None, best: Tensor, best_points: Tensor) -> Tensor | None:
        """Take in what the evaluation of iterate `step` showed; return bool (n,), who restarts from its best."""
        return self._schedule.record(rose, best, step)

    def take(self, keep: Tensor) -> None:
        """Keep these samples alone."""
        self._threat, self._x = self._threat.take(keep), self._x[keep]
        self._schedule.take(keep)
        self._previous = None if self._previous is None else self._previous[keep]
        if self._corners is not None:
            self._corners = self._corners[0][keep], self._corners[1][keep]

    def _project(self, points: Tensor) -> Tensor:
        return self._threat.project(points, self._x) if self._corners is None else points.clamp_(*self._corners)


class Sparse:
    """One step moves the coordinates with the largest gradients by the same amount each; no momentum."""

    def __init__(self, threat: Lp, x: Tensor, schedule: Sparsity) -> None:
        self._threat, self._x, self._schedule = threat, x, schedule

    def move(self, points: Tensor, gradient: Tensor) -> Tensor:
        """Return the next points (n, C, H, W), inside the threat."""
        slopes = gradient.masked_fill(stuck(points, gradient, self._threat.bounds), 0).flatten(1)
        descending = slopes.abs().sort(dim=1, descending=True).values
        least = descending.gather(1, self._schedule.moved.unsqueeze(1) - 1)
        direction = (slopes.sign() * (slopes.abs() >= least)).reshape(points.shape)
        weight = self._schedule.size / direction.abs().sum(dim=(1, 2, 3), keepdim=True).clamp_min(1)
        return self._threat.project(torch.addcmul(points, direction, weight), self._x)

    def look(self, step: int, rose: Tensor | None, best: Tensor, best_points: Tensor) -> Tensor | None:
        """Take in what the evaluation of iterate `step` showed; return bool (n,), who restarts from its best."""
        return self._schedule.record(best_points, self._x, step)

    def take(self, keep: Tensor) -> None:
        """Keep these samples alone."""
        self._threat, self._x = self._threat.take(keep), self._x[keep]
        self._schedule.take(keep)
