"""The iterative core: steps along the threat's steepest direction. Gradient attacks are settings of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_lite.core.checks import parse_number
from robustbench_lite.core.losses import Loss
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["Ascent", "Estimator", "autograd", "supports_steps"]

Estimator = Callable[[Oracle, Tensor, Tensor, Loss], Tensor]


def autograd(oracle: Oracle, points: Tensor, rows: Tensor, loss: Loss) -> Tensor:
    """Estimate the gradient of the loss at candidate points (n, ...) by back-propagation."""
    return oracle.gradient(points, rows, loss)[1]


def supports_steps(threat: Threat) -> bool:
    """Say whether the threat has a steepest direction and a budget: an linf, l2 or l1 ball with an eps."""
    return isinstance(threat, Lp) and threat.norm in ("linf", "l2", "l1") and threat.eps is not None


@dataclass(frozen=True)
class Ascent:
    """Projected steepest ascent: point <- project(point + step_size * steepest(gradient)), `steps` times.

    Attributes:
        loss: the function to ascend.
        steps: number of steps.
        path: total length of the steps as a multiple of eps.
        step_size: length of one step in the units of the images, in place of `path * eps / steps`.
        density: for l1, the share of the coordinates that a step moves.
        estimator: where gradients come from; it also puts the points to the oracle as candidates.
    """

    loss: Loss
    steps: int
    path: float
    step_size: float | str | None = None
    density: float | None = None
    estimator: Estimator = autograd

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be a whole number, at least 1, got {self.steps!r}")
        if self.step_size is not None and not parse_number(self.step_size) > 0:
            raise ValueError(f"step_size must be > 0, got {self.step_size}; for pixel units write '2/255'")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")

    def __call__(self, oracle: Oracle, threat: Lp, rows: Tensor, points: Tensor) -> None:
        """Ascend from `points` (n, C, H, W) for `rows` of the batch; the oracle keeps what is found.

        Samples that have fallen, or cannot pay, leave on the way.
        """
        for step in range(self.steps):
            if step % oracle.compact_every == 0:
                keep = oracle.still(rows, oracle.gradient_cost)
                rows, points = rows[keep], points[keep]
            if len(rows) == 0:
                return
            gradient = self.estimator(oracle, points, rows, self.loss)
            points = self._step(oracle.x[rows], threat.take(rows), points, gradient)
        keep = oracle.still(rows, oracle.judge_cost)
        if len(keep):
            oracle.judge(points[keep], rows[keep], self.loss)

    @torch.no_grad()
    def _step(self, x: Tensor, threat: Lp, points: Tensor, gradient: Tensor) -> Tensor:
        direction = threat.steepest(gradient, self.density, at=points)
        share = self.path / self.steps
        length = share * threat.radius(x) if self.step_size is None else parse_number(self.step_size)
        return threat.project(points + length * direction, x)
