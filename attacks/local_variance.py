"""Greedy changes where the image is busy: the pixels that widen the gap most for what the eye sees of them.

Threat: weighted l1 (`WeightedLp`), with a budget or without. Access: gradients.
Source: Luo, Liu, Wei and Xu 2018, "Towards Imperceptible and Robust Adversarial Example Attacks against Neural
Networks" (1801.04693).
Departures: the sensitivity of a flat region is that of the threat's floor (the original divides by 0 there); entries at
an image bound that would leave it are passed over; a step that would exceed the budget is cut to it, and the search
ends; "pixel" means one channel of one. Defaults are ours: the original's are not at hand. With `stop="never"` the gap
is raised to the end of the budget, as the original does to survive noise; by default a sample leaves at its first
success. The same geometry with steepest steps is `PGD` on a `WeightedLp` threat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.checks import parse_number
from robustbench_lite.core.goals import Goal, Targeted
from robustbench_lite.core.norms import stuck
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Threat
from robustbench_lite.core.weighted import WeightedLp

__all__ = ["LocalVariance", "probability_gap"]

HALVINGS = 40  # of the last step, which is cut to the budget


def probability_gap(logits: Tensor, goal: Goal) -> Tensor:
    """Return the margin of the probabilities p, float64 (B,): p_t - max_{j != t} p_j, or max_{j != y} p_j - p_y.

    The probability to beat is written as 1 less all others: its own gradient is lost to rounding where it is near 1.
    """
    p, named = logits.double().softmax(dim=1), goal.labels.unsqueeze(1)
    other = p.detach().scatter(1, named, -1).argmax(dim=1, keepdim=True)
    wanted, beaten = (named, other) if isinstance(goal, Targeted) else (other, named)
    return p.gather(1, wanted).squeeze(1) + p.scatter(1, beaten, 0).sum(dim=1) - 1


@dataclass(frozen=True)
class LocalVariance(Attack):
    """Greedy search by priority: the gradient of the probability gap over the sensitivity to a change.

    Attributes:
        steps: most rounds.
        pixels: entries changed in each round, those of the highest priority.
        step_size: how far each is changed, in the units of the images.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    steps: int = 500
    pixels: int = 3
    step_size: float | str = "10/255"

    def __post_init__(self) -> None:
        for name in ("steps", "pixels"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
        if not parse_number(self.step_size) > 0:
            raise ValueError(f"step_size must be > 0, got {self.step_size}; for pixel units write '2/255'")

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is the weighted l1 ball, with a budget or without."""
        return isinstance(threat, WeightedLp) and threat.norm == "l1"

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Change the pixels of the highest priority until the budget is spent."""
        ball = cast(WeightedLp, threat).around(x)
        rows = oracle.standing(oracle.gradient_cost)
        points = x[rows]
        for _ in range(self.steps):
            keep = oracle.still(rows, oracle.gradient_cost)
            rows, points = rows[keep], points[keep]
            if len(rows) == 0:
                break
            gradient = oracle.gradient(points, rows, probability_gap)[1]
            changed = self._change(points, gradient, ball.take(rows))
            points, ended = _within(changed, points, x[rows], ball.take(rows))
            self._judge(oracle, rows[ended], points[ended])
            rows, points = rows[~ended], points[~ended]
        self._judge(oracle, rows, points)
        return oracle.best

    def _change(self, points: Tensor, gradient: Tensor, ball: WeightedLp) -> Tensor:
        """Move the entries of the highest priority up the gradient, within the bounds."""
        gradient = gradient.masked_fill(stuck(points, gradient, ball.bounds), 0)
        priority = (gradient.double().abs() / ball.weights(points)).flatten(1)
        top = priority.topk(min(self.pixels, priority.shape[1]), dim=1).indices
        chosen = torch.zeros_like(priority, dtype=torch.bool).scatter_(1, top, True).reshape(points.shape)
        return (points + parse_number(self.step_size) * gradient.sign() * chosen).clamp(*ball.bounds)

    @staticmethod
    def _judge(oracle: Oracle, rows: Tensor, points: Tensor) -> None:
        keep = oracle.still(rows, oracle.judge_cost)
        if len(keep):
            oracle.judge(points[keep], rows[keep], probability_gap)


def _within(changed: Tensor, points: Tensor, x: Tensor, ball: WeightedLp) -> tuple[Tensor, Tensor]:
    """Cut a step to the budget; say whose search has ended: the budget is spent, or nothing moved. (n, ...), (n,).

    The distance along a step is convex, and the step begins inside: one bisection finds where it leaves.
    """
    still = (changed == points).flatten(1).all(dim=1)
    if ball.eps is None:
        return changed, still
    over = ball.distance(changed, x) > float(ball.eps)
    low, high = points.new_zeros(len(points), 1, 1, 1), points.new_ones(len(points), 1, 1, 1)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        fits = (ball.distance(torch.lerp(points, changed, middle), x) <= float(ball.eps)).reshape(-1, 1, 1, 1)
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return torch.where(over.reshape(-1, 1, 1, 1), torch.lerp(points, changed, low), changed), over | still
