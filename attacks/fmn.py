"""Fast minimum-norm: the nearest adversarial example, for one gradient a step.

Threat: linf, l2, l1, l0; with a budget, or without (as near as possible). Access: gradients.
Source: Pintor, Roli, Brendel and Biggio 2021, "Fast Minimum-norm Adversarial Attacks through Adaptive Norm
Constraints" (2102.12827). Each sample has a radius of its own: the first-order estimate of the distance to the
boundary until something adversarial is met, and from then on a little less after each success, a little more after
each failure.
Departures, without which it misses most images of nets whose gradients point out of the image bounds (mnist/pgd_at_0.3,
linf, 100 steps: the original breaks 42 of 100, this one 79; `benchmarks/minimum_norm.py --norms linf`): entries at a
bound that cannot move take no part in a step; steps end on the sphere of the radius, clipping counted, not merely
inside the ball; the estimate of the distance is trusted for the length of one step, and grows by gamma, since a linear
model would be approached from below and never crossed. The loss anneals from a soft margin, whose direction is that of
the cross-entropy (DDN's loss), to the margin (the original's loss). Further: the last point is judged (one pass more
than `steps`); with a budget, the radius never exceeds it; l0 counts pixels unless the threat counts coordinates, and
its radius never falls below 1; there are no adversarial starting points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Self, cast

import torch
from torch import Tensor

from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.goals import Goal, Targeted
from robustbench_lite.core.losses import margin
from robustbench_lite.core.norms import NORMS, stuck
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["FMN"]

SCALINGS = 8  # rounds towards the sphere, each step
COLD = 0.01  # temperature, in units of the logits, below which a soft maximum is the maximum


@dataclass(frozen=True)
class FMN(Attack):
    """Normalised gradient steps, projected on a ball whose radius closes in on the boundary.

    Attributes:
        steps: gradient steps.
        alpha_init: l2 length of the first step, in the units of the images; it falls along a cosine.
        alpha_final: l2 length of the last step; None: `alpha_init / 100`.
        gamma_init: share by which the radius shrinks or grows at first; it falls along a cosine.
        gamma_final: that share in the end.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    steps: int = 100
    alpha_init: float = 1.0
    alpha_final: float | None = None
    gamma_init: float = 0.05
    gamma_final: float = 0.001

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be a whole number, at least 1, got {self.steps!r}")
        for name in ("alpha_init", "alpha_final"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be > 0, got {value}")
        for name in ("gamma_init", "gamma_final"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is an Lp ball; it needs no budget."""
        return isinstance(threat, Lp)

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Search each sample's nearest adversarial example from the clean image; deterministic."""
        rows = oracle.standing(oracle.gradient_cost)
        search = _Search.start(x[rows], cast(Lp, threat).take(rows))
        for step in range(self.steps):
            if step % oracle.compact_every == 0:
                keep = oracle.still(rows, oracle.gradient_cost)
                rows, search = rows[keep], search.take(keep)
            if len(rows) == 0:
                return oracle.best
            cosine = (1 + math.cos(math.pi * step / self.steps)) / 2
            value, gradient = oracle.gradient(search.points, rows, partial(_soft_margin, temperature=cosine))
            search = search.step(oracle.verdict, value, gradient, *self._sizes(cosine))
        keep = oracle.still(rows, oracle.judge_cost)
        if len(keep):
            oracle.judge(search.points[keep], rows[keep], margin)
        return oracle.best

    def _sizes(self, cosine: float) -> tuple[float, float]:
        """Return the l2 length of a step, and the share by which radii change."""
        final = self.alpha_init / 100 if self.alpha_final is None else self.alpha_final
        return (
            final + (self.alpha_init - final) * cosine,
            self.gamma_final + (self.gamma_init - self.gamma_final) * cosine,
        )


@dataclass(frozen=True, eq=False)
class _Search:
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
        low, high = threat.bounds
        widest = threat.distance(torch.where(x - low > high - x, low, high), x).to(x.dtype)
        if threat.eps is not None:
            widest = torch.minimum(widest, threat.radius(x).reshape(-1))
        return cls(threat, x, x, torch.ones_like(widest), torch.full_like(widest, torch.inf), widest)

    def take(self, keep: Tensor) -> Self:
        return type(self)(
            self.threat.take(keep),
            *(part[keep] for part in (self.x, self.points, self.radius, self.nearest, self.widest)),
        )

    @torch.no_grad()
    def step(self, fooled: Tensor, value: Tensor, gradient: Tensor, length: float, share: float) -> Self:
        """Return the search after what the model said at `points`: the radius moves by `share`, the points by `length`.

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


def _soft_margin(logits: Tensor, goal: Goal, temperature: float) -> Tensor:
    """Return the margin with a soft maximum over the other logits.

    At temperature 1 it has the direction of the cross-entropy, and does not saturate; at 0 it is the margin.
    """
    if temperature < COLD:
        return margin(logits, goal)
    column = goal.labels.unsqueeze(1)
    others = (logits / temperature).scatter(1, column, -torch.inf).logsumexp(dim=1)
    value = temperature * others - logits.gather(1, column).squeeze(1)
    return -value if isinstance(goal, Targeted) else value
