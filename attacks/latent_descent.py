"""Latent descent: walk from the image towards what another class of a generative classifier would make of it.

Threat: linf, l2, l1, l0; with a budget, or without (as near as possible). Access: gradients; the model must be
`Generative`.
Source: Schott, Rauber, Bethge and Brendel 2018, "Towards the First Adversarially Robust Neural Network Model on MNIST"
(1805.09190), its attack on its own defense.
Departures: the points of the walk are the reconstruction's projections on growing balls around the image, which is the
straight line of the original in l2; linf clips the change, l1 and l0 change the pixels that differ most. The nearest
reconstruction of another class, or the target's, is the aim. With a budget the walk is its one point, the projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.goals import Goal, Targeted
from robustbench_lite.core.insides import Generative
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["LatentDescent"]


@dataclass(frozen=True)
class LatentDescent(Attack):
    """One reconstruction, a walk towards it, and bisection where the walk first succeeds.

    Attributes:
        points: equally spaced points of the walk, the reconstruction the last; for threats without a budget.
        halvings: bisections of the interval before the first success.

    Raises:
        ValueError: no point, or a negative number of halvings.
    """

    needs: ClassVar[type | None] = Generative

    points: int = 50
    halvings: int = 10

    def __post_init__(self) -> None:
        for name, least in (("points", 1), ("halvings", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number, at least {least}, got {value!r}")

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is an Lp ball; it needs no budget."""
        return isinstance(threat, Lp)

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Walk, for the samples that still stand and can pay for a reconstruction and one candidate."""
        ball, distances = cast(Lp, threat), _Distances(oracle.inside(Generative))  # type: ignore[type-abstract]
        rows = oracle.standing(distances.cost + oracle.judge_cost)
        if len(rows) == 0:
            return oracle.best
        # half the squared distance has the gradient x - G: no other way to the reconstruction is counted
        _, away = oracle.gradient(x[rows], rows, _nearest, candidate=False, through=distances)
        far = (x[rows] - away).clamp(*threat.bounds)
        if ball.eps is not None:
            oracle.judge(ball.take(rows).project(far, x[rows]), rows)
            return oracle.best
        self._walk(oracle, ball, rows, far)
        return oracle.best

    def _walk(self, oracle: Oracle, threat: Lp, rows: Tensor, far: Tensor) -> None:
        """Try balls of growing radius until one succeeds; then halve the interval between it and the last failure."""
        way = threat.distance(far, oracle.x[rows]).to(far.dtype)
        low, high = torch.zeros_like(way), torch.full_like(way, torch.inf)
        for point in range(1, self.points + 1):
            walking = (high == torch.inf).nonzero().flatten()
            self._try(oracle, threat, rows, far, way * (point / self.points), low, high, walking)
        for _ in range(self.halvings):
            self._try(oracle, threat, rows, far, (low + high) / 2, low, high, (high < torch.inf).nonzero().flatten())

    def _try(
        self,
        oracle: Oracle,
        threat: Lp,
        rows: Tensor,
        far: Tensor,
        radius: Tensor,
        low: Tensor,
        high: Tensor,
        which: Tensor,
    ) -> None:
        """Judge the projections on balls of these radii at the positions `which`, and note successes and failures."""
        which = which[oracle.still(rows[which], oracle.judge_cost)]
        if len(which) == 0:
            return
        x, size = oracle.x[rows[which]], radius[which]
        oracle.judge(Lp(threat.norm, size, threat.bounds, threat.per).project(far[which], x), rows[which])
        high[which] = torch.where(oracle.verdict, size, high[which])
        low[which] = torch.where(oracle.verdict, low[which], size)


class _Distances(nn.Module):
    """Half the squared distances (n, K) to each class's best reconstruction, which is held fixed."""

    cost = 1

    def __init__(self, inside: Generative) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            images = self.inside.reconstruct(x.detach())
        return (x.unsqueeze(1) - images).square().flatten(2).sum(dim=2) / 2


def _nearest(distances: Tensor, goal: Goal) -> Tensor:
    """Return the distance to the target, or to the nearest class that is not the label, (n,)."""
    column = goal.labels.unsqueeze(1)
    if not isinstance(goal, Targeted):
        column = distances.detach().scatter(1, column, torch.inf).argmin(dim=1, keepdim=True)
    return distances.gather(1, column).squeeze(1)
