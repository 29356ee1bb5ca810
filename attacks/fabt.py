"""FAB, the fast adaptive boundary attack, towards one class after the other: the nearest adversarial example.

Threat: linf, l2, l1; with a budget, or without (as near as possible). Access: gradients.
Source: Croce and Hein 2019, "Minimally distorted Adversarial Attacks with a Fast Adaptive Boundary Attack"
(1907.02044); its targeted form, as in AutoAttack (Croce and Hein 2020, 2003.01690).
Departures: one forward pass serves the check of a point and the gradient there, where the original spends two; a point
that fooled the model is asked about again only after its backward step. Each sample's last point is judged too. With a
budget, a sample leaves at its first success inside. Without one, random restarts begin within half the distance of the
nearest example found. A targeted goal linearises the margin of that class to the best other one. The original's final
search along the segment to the clean image is left out, as in AutoAttack.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from robustbench_lite.attacks._fab_projections import NEAREST
from robustbench_lite.attacks._targets import Towards, difference, likeliest_targets
from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.goals import Goal, Targeted
from robustbench_lite.core.losses import Loss, margin
from robustbench_lite.core.norms import NORMS
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.rows import pick
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["FABT"]

START_RADIUS = {
    "linf": 0.3,
    "l2": 1.0,
    "l1": 5.0,
}  # of restarts that know neither a budget nor an example; the original's


@dataclass(frozen=True)
class FABT(Attack):
    """Steps to the linearised decision boundary, pulled towards the clean image.

    Attributes:
        steps: steps towards each class, from each start.
        restarts: starts for each class: the clean image, then random ones.
        target_classes: classes tried, most likely first; at most all others.
        alpha_max: largest weight of the clean image's own projection in a step.
        eta: overshoot beyond the boundary, at least 1.
        beta: share of the change that is kept after a success, the backward step.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    steps: int = 100
    restarts: int = 1
    target_classes: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def __post_init__(self) -> None:
        for name in ("steps", "restarts", "target_classes"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
        if not 0 <= self.alpha_max <= 1:
            raise ValueError(f"alpha_max must be in [0, 1], got {self.alpha_max}")
        if not self.eta >= 1:
            raise ValueError(f"eta must be at least 1, got {self.eta}")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta must be between 0 and 1, got {self.beta}")

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is an linf, l2 or l1 ball; it needs no budget."""
        return isinstance(threat, Lp) and threat.norm in NEAREST

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Approach the boundary to each class in turn, on the samples that still search."""
        rows, ball = oracle.standing(1), cast(Lp, threat)
        if len(rows) == 0:
            return oracle.best
        duels: list[tuple[Loss, Goal]] = [(margin, goal)]
        if not isinstance(goal, Targeted):
            rivals = self._rivals(oracle, rows, goal)
            duels = [(difference, Towards(goal.labels, rival)) for rival in rivals]
        for loss, aim in duels:
            for restart in range(self.restarts):
                rows = rows[oracle.still(rows, oracle.gradient_cost)]
                start = self._start(oracle, ball, rows, streams.take(rows)) if restart else oracle.x[rows]
                self._approach(oracle, ball, rows, start, loss, aim)
        return oracle.best

    def _rivals(self, oracle: Oracle, rows: Tensor, goal: Goal) -> list[Tensor]:
        """Return the classes to try, most likely first: labels int64 (B,) of the whole batch each."""
        logits = oracle.scores(oracle.x[rows], rows, candidate=False).nan_to_num(nan=-torch.inf)
        classes = likeliest_targets(logits, goal.labels[rows], self.target_classes)
        return [goal.labels.index_copy(0, rows, column) for column in classes.T]

    @staticmethod
    def _start(oracle: Oracle, threat: Lp, rows: Tensor, streams: Streams) -> Tensor:
        """Return random points at half the budget or half the distance of the nearest example, whichever is less."""
        x, part = oracle.x[rows], threat.take(rows)
        nearest = part.distance(oracle.best[rows], x).to(x.dtype).reshape(-1, 1, 1, 1)
        nearest = torch.where(oracle.found.fallen[rows].reshape(-1, 1, 1, 1), nearest, torch.inf)
        budget = x.new_full((1, 1, 1, 1), START_RADIUS[threat.norm]) if threat.eps is None else part.radius(x)
        shape = x.shape[1:]
        noise = 2 * streams.uniform(*shape, dtype=x.dtype) - 1 if threat.norm == "linf" else None
        noise = streams.normal(*shape, dtype=x.dtype) if noise is None else noise
        unit = noise / NORMS[threat.norm].size(noise).reshape(-1, 1, 1, 1)
        points: Tensor = x + torch.minimum(nearest, budget) / 2 * unit
        return points.clamp(*threat.bounds)

    def _approach(self, oracle: Oracle, threat: Lp, rows: Tensor, points: Tensor, loss: Loss, aim: Goal) -> None:
        """Take `steps` steps from `points`; after each success a backward step, and the next step starts there.

        Where a sample's last step succeeded, the next one probably does too: then its end is asked about without a
        gradient first, which would be thrown away. Each sample counts its own steps.
        """
        left = torch.full_like(rows, self.steps)
        stepped = torch.ones_like(rows, dtype=torch.bool)  # the point is the end of a step, not of a backward one
        likely = ~stepped
        for question in range(2 * self.steps + 1):
            if question % oracle.compact_every == 0:
                keep = oracle.still(rows, oracle.gradient_cost)
                keep = keep[left[keep] >= 0]
                rows, points, left, stepped, likely = (v[keep] for v in (rows, points, left, stepped, likely))
            if len(rows) == 0:
                return
            points, back = self._foresee(oracle, rows, points, (stepped & likely).nonzero().flatten())
            stepped = stepped & ~back
            keep = oracle.still(rows, oracle.gradient_cost)
            rows, points, left, stepped, likely = (v[keep] for v in (rows, points, left, stepped, likely))
            if len(rows) == 0:
                return
            x = oracle.x[rows]
            value, gradient = oracle.gradient(points, rows, loss, aim.take(rows))
            hit = oracle.verdict & stepped
            ahead = self._step(threat, x, points, value, gradient)
            points = pick(hit, x + self.beta * (points - x), ahead)
            left, likely, stepped = left - (~hit).long(), hit | (likely & ~stepped), ~hit

    def _foresee(self, oracle: Oracle, rows: Tensor, points: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """Ask about the points at positions `asked` without gradients, and take those that succeed a step back.

        Returns the points, and bool (n,): which were taken back.
        """
        back = torch.zeros_like(rows, dtype=torch.bool)
        asked = asked[oracle.still(rows[asked], oracle.judge_cost + oracle.gradient_cost)]
        if len(asked) == 0:
            return points, back
        oracle.judge(points[asked], rows[asked])
        back[asked] = oracle.verdict
        x = oracle.x[rows]
        return pick(back, x + self.beta * (points - x), points), back

    @torch.no_grad()
    def _step(self, threat: Lp, x: Tensor, points: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        """Return points just beyond the boundary of the linearised model, value + <gradient, . - points> = 0.

        They lie between the projection of the point and that of the clean image, each overshot by `eta`.
        """
        normal = gradient.flatten(1)
        at, clean = points.flatten(1), x.flatten(1)
        gain = -value.reshape(-1, 1)
        gain_clean = gain + (normal * (at - clean)).sum(dim=1, keepdim=True)
        (low, high), nearest = threat.bounds, NEAREST[threat.norm]
        move = nearest(normal, gain, low - at, high - at)
        move_clean = nearest(normal, gain_clean, low - clean, high - clean)
        here, there = (NORMS[threat.norm].size(d).reshape(-1, 1).clamp_min(1e-8) for d in (move, move_clean))
        alpha = (here / (here + there)).clamp_max(self.alpha_max)
        stepped: Tensor = (1 - alpha) * (at + self.eta * move) + alpha * (clean + self.eta * move_clean)
        return stepped.clamp(low, high).reshape(points.shape)
