"""The Lagrangian attack: a penalty on the distance in place of a projection, its weight found by dual ascent.

Threat: l2. Access: gradients.
Source: the penalty is that of Szegedy et al. 2013, "Intriguing properties of neural networks" (1312.6199), and of
Carlini and Wagner 2016, "Towards Evaluating the Robustness of Neural Networks" (1608.04644), who search one multiplier
a sample for the nearest adversarial example; here dual ascent moves it towards a given budget:
max over x' of L(x') - lam R(x, x'), and lam <- max(0, lam + rho (R - budget)).
Departures: R = ||x' - x||^2 / (2 eps), with budget eps / 2: the squared norm pulls harder the farther a point is, which
damps the ascent, while the plain norm lets it swing for ever. The gradient of L is scaled to unit length, so that the
multiplier is near 1 at the solution whatever the scale of the logits. The image bounds are kept by clipping, not by a
change of variables, whose gradient vanishes on black and white pixels. Each iterate is judged where it lies inside the
ball; the last one of each run is projected on it and judged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.goals import Goal
from robustbench_lite.core.losses import loss_named
from robustbench_lite.core.norms import NORMS, stuck
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["LagrangianAttack"]


@dataclass(frozen=True)
class LagrangianAttack(Attack):
    """Gradient ascent in the image, dual ascent in one multiplier a sample, in turn.

    Attributes:
        steps: steps of each run, one forward and one backward pass each.
        step_size: first step of the image as a share of eps; it falls to a hundredth along a cosine.
        rho: step of the multiplier over that of the image. On a smooth loss 0.25 is critical damping; a larger value
            lets the distance swing around eps at first, and holds it there where the gradient is jagged.
        restarts: runs; the first from the clean image, the others from random points of the ball.
        loss: "ce", "margin" or "dlr".

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    steps: int = 100
    step_size: float = 0.3
    rho: float = 4.0
    restarts: int = 1
    loss: str = "ce"

    def __post_init__(self) -> None:
        loss_named(self.loss)
        for name in ("steps", "restarts"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, got {getattr(self, name)!r}")
        if not 0 < self.step_size <= 1:
            raise ValueError(f"step_size must be in (0, 1], a share of eps, got {self.step_size}")
        if not self.rho > 0:
            raise ValueError(f"rho must be > 0, got {self.rho}")

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is an l2 ball with a budget."""
        return isinstance(threat, Lp) and threat.norm == "l2" and threat.eps is not None

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Run from the clean image, then from random points for the samples that still stand."""
        for run in range(self.restarts):
            rows = oracle.standing(oracle.gradient_cost)
            ball = threat.take(rows)
            self._ascend(oracle, rows, x[rows] if run == 0 else ball.random_point(x[rows], streams.take(rows)))
        return oracle.best

    def _ascend(self, oracle: Oracle, rows: Tensor, points: Tensor) -> None:
        loss, multiplier = loss_named(self.loss), torch.ones_like(points[:, :1, :1, :1])
        for step in range(self.steps):
            if step % oracle.compact_every == 0:
                keep = oracle.still(rows, oracle.gradient_cost)
                rows, points, multiplier = rows[keep], points[keep], multiplier[keep]
            if len(rows) == 0:
                return
            gradient = oracle.gradient(points, rows, loss)[1]
            share = self.step_size * (0.01 + 0.99 * (1 + math.cos(math.pi * step / self.steps)) / 2)
            points, multiplier = self._step(oracle, rows, points, multiplier, gradient, share)
        keep = oracle.still(rows, oracle.judge_cost)
        if len(keep):
            rows = rows[keep]
            oracle.judge(oracle.threat.take(rows).project(points[keep], oracle.x[rows]), rows, loss)

    @torch.no_grad()
    def _step(
        self, oracle: Oracle, rows: Tensor, points: Tensor, multiplier: Tensor, gradient: Tensor, share: float
    ) -> tuple[Tensor, Tensor]:
        """Return the points and multipliers (n, 1, 1, 1) after a step; lengths are in units of eps."""
        threat, x = oracle.threat.take(rows), oracle.x[rows]
        assert isinstance(threat, Lp)
        eps = threat.radius(x)
        low, high = threat.bounds
        held = stuck(points, gradient, threat.bounds)
        rise = NORMS["l2"].steepest(gradient.masked_fill(held, 0), None)
        rise = torch.where(held, gradient.sign(), rise)  # held at the bound, against the penalty
        points = (points + share * (eps * rise - multiplier * (points - x))).clamp(low, high)
        length = NORMS["l2"].size(points - x).reshape(-1, 1, 1, 1) / torch.where(eps > 0, eps, 1)
        return points, (multiplier + self.rho * share * (length.square() - 1) / 2).clamp_min(0)
