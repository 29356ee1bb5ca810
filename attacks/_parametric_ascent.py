"""Projected steepest ascent on the parameters of a threat: the loop of the gradient attacks that move things."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.checks import parse_number
from robustbench_lite.core.goals import Goal
from robustbench_lite.core.losses import Loss, loss_named
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.spatial import ParametricThreat
from robustbench_lite.core.threats import Threat

__all__ = ["ParametricAscent"]


@dataclass(frozen=True)
class ParametricAscent(Attack):
    """Ascent with momentum from random points; a subclass says which threat it searches.

    Attributes:
        steps: gradient steps in each run.
        step_size: length of a step as a share of the budget; None: `path / steps`.
        restarts: runs from fresh random points, each on the samples that still stand.
        loss: "ce", "margin" or "dlr".
        momentum: share of the last direction that is kept; gradients, each over its l1 norm, add up to it.
        path: total length of the default steps in budgets.

    Raises:
        ValueError: a setting out of range.
    """

    path: ClassVar[float] = 5.0

    steps: int = 40
    step_size: float | str | None = None
    restarts: int = 1
    loss: str = "margin"
    momentum: float = 0.75

    def __post_init__(self) -> None:
        loss_named(self.loss)
        for name in ("steps", "restarts"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, got {getattr(self, name)!r}")
        if self.step_size is not None and not parse_number(self.step_size) > 0:
            raise ValueError(f"step_size must be > 0, a share of the budget, got {self.step_size}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")

    @abstractmethod
    def supports(self, threat: Threat) -> bool:
        """Say whether the attack can search this threat: one with parameters and a budget."""

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Run `restarts` ascents, each on the samples that still stand."""
        assert isinstance(threat, ParametricThreat)
        for _ in range(self.restarts):
            rows = oracle.standing(oracle.gradient_cost)
            self._ascend(oracle, threat, rows, threat.random_point(x[rows], streams.take(rows)))
        return oracle.best

    def _ascend(self, oracle: Oracle, threat: ParametricThreat, rows: Tensor, points: Tensor) -> None:
        loss, velocity = loss_named(self.loss), torch.zeros_like(points)
        share = self.path / self.steps if self.step_size is None else parse_number(self.step_size)
        for step in range(self.steps):
            if step % oracle.compact_every == 0:
                keep = oracle.still(rows, oracle.gradient_cost)
                rows, points, velocity = rows[keep], points[keep], velocity[keep]
            if len(rows) == 0:
                return
            points, velocity = self._step(oracle, threat, rows, points, velocity, loss, share)
        keep = oracle.still(rows, oracle.judge_cost)
        if len(keep):
            oracle.judge(points[keep], rows[keep], loss)

    def _step(
        self,
        oracle: Oracle,
        threat: ParametricThreat,
        rows: Tensor,
        points: Tensor,
        velocity: Tensor,
        loss: Loss,
        share: float,
    ) -> tuple[Tensor, Tensor]:
        _, gradient = oracle.gradient(points, rows, loss)
        size = gradient.abs().flatten(1).sum(dim=1).reshape(-1, *[1] * (gradient.ndim - 1))
        velocity = self.momentum * velocity + gradient / torch.where(size > 0, size, 1)
        x = oracle.x[rows]
        return threat.project(points + share * threat.steepest(velocity, x), x), velocity
