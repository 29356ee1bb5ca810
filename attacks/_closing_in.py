"""Minimum-norm searches: a radius of its own for each sample, which closes in on the boundary."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from robustbench_lite.core.goals import Goal, Targeted
from robustbench_lite.core.losses import margin
from robustbench_lite.core.norms import NORMS, stuck
from robustbench_lite.core.threats import Lp

__all__ = ["Search", "soft_margin"]

SCALINGS = 8  # rounds towards the sphere, each step
COLD = 0.01  # temperature, in units of the logits, below which a soft maximum is the maximum


@dataclass(frozen=True, eq=False)
class Search:
    """Where n searches stand.

    `x` and `points` are images (n, C, H, W); the rest is (n,): `radius` of the ball to search next, distance of the
    `nearest` adversarial point met (+inf: none), `widest` radius allowed.
    """

    threat: Lp
    x: Tensor
    points: Tensor
    radius: Tensor
    nearest: Tensor
    widest: Tensor

    @classmethod
    def start(cls, x: Tensor, threat: Lp) -> Self:
        """Return the search at the clean images."""
        low, high = (x.new_tensor(bound) for bound in threat.bounds)
        widest = threat.distance(torch.where(x - low > high - x, low, high), x).to(x.dtype)
        if threat.eps is not None:
            widest = torch.minimum(widest, threat.radius(x).reshape(-1))
        return cls(threat, x, x, torch.ones_like(widest), torch.full_like(widest, torch.inf), widest)

    @classmethod
    def outside(cls, x: Tensor, threat: Lp, points: Tensor) -> Self:
        """Return the search at far `points` (n, C, H, W): no budget binds on the way in."""
        search = cls.start(x, replace(threat, eps=None))
        return replace(search, points=points, radius=threat.distance(points, x).to(x.dtype))

    def take(self, keep: Tensor) -> Self:
        """Return the searches at these positions."""
        parts = {name: getattr(self, name)[keep] for name in ("x", "points", "radius", "nearest", "widest")}
        return replace(self, threat=self.threat.take(keep), **parts)

    @torch.no_grad()
    def step(self, fooled: Tensor, value: Tensor, gradient: Tensor, length: float | Tensor, share: float) -> Self:
        """Return the search after what the model said at `points`: the radius moves by `share`, the points by `length`.

        The length is one for all, or (n, 1, 1, 1).

        Entries at an image bound whose gradient points out of it could not move, and would use the step up.
        """
        gradient = gradient.masked_fill(stuck(self.points, gradient, self.threat.bounds), 0)
        step = length * NORMS["l2"].steepest(gradient, None)
        distance = self.threat.distance(self.points, self.x).to(self.radius.dtype)
        nearest = torch.where(fooled, torch.minimum(self.nearest, distance), self.nearest)
        if self.threat.norm == "l0":
            radius = self._pixels(fooled, nearest, share)
        else:
            radius = self._radius(fooled, nearest, share, distance + self._reach(value, gradient, step))
        radius = torch.minimum(radius, self.widest)
        return replace(self, points=self._inside(radius, step), radius=radius, nearest=nearest)

    def _radius(self, fooled: Tensor, nearest: Tensor, share: float, estimate: Tensor) -> Tensor:
        missed = torch.where(nearest.isfinite(), self.radius, estimate) * (1 + share)
        return torch.where(fooled, torch.minimum(self.radius * (1 - share), nearest), missed)

    def _pixels(self, fooled: Tensor, nearest: Tensor, share: float) -> Tensor:
        fewer = torch.minimum(self.radius - 1, (self.radius * (1 - share)).floor())
        more = torch.maximum(self.radius + 1, (self.radius * (1 + share)).floor())
        return torch.where(fooled, torch.minimum(fewer, nearest), more).clamp_min(1)

    def _reach(self, value: Tensor, gradient: Tensor, step: Tensor) -> Tensor:
        """Return how far the boundary is to first order, at most the length of the step."""
        slope = NORMS[self.threat.dual_norm].size(gradient)
        ahead = value.abs() / slope.clamp_min(torch.finfo(slope.dtype).tiny)
        return torch.minimum(ahead.nan_to_num(nan=torch.inf), NORMS[self.threat.norm].size(step))

    def _inside(self, radius: Tensor, step: Tensor) -> Tensor:
        """Return the points after `step`, on the sphere of `radius` where the image bounds allow it.

        Scaling by radius / (length after clipping) approaches the sphere from below, since clipped length over scale
        never grows with the scale.
        """
        low, high = self.threat.bounds[0] - self.x, self.threat.bounds[1] - self.x
        moved = self.points + step - self.x
        if self.threat.norm != "l0":
            norm = NORMS[self.threat.norm]
            for _ in range(SCALINGS):
                length = norm.size(moved.clamp(low, high))
                factor = torch.where((length > 0) & (length < (1 - 1e-4) * radius), radius / length, 1)
                if moved.device.type == "cpu" and not bool((factor > 1).any()):
                    break  # each has settled: more rounds would change nothing
                moved = moved * factor.reshape(-1, 1, 1, 1)
        return replace(self.threat, eps=radius).project(self.x + moved, self.x)


def soft_margin(logits: Tensor, goal: Goal, temperature: float) -> Tensor:
    """Return the margin with a soft maximum over the other logits.

    At temperature 1 it has the direction of the cross-entropy, and does not saturate; at 0 it is the margin.
    """
    if temperature < COLD:
        return margin(logits, goal)
    column = goal.labels.unsqueeze(1)
    others = (logits / temperature).scatter(1, column, -torch.inf).logsumexp(dim=1)
    value = temperature * others - logits.gather(1, column).squeeze(1)
    return -value if isinstance(goal, Targeted) else value
