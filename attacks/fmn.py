"""Fast minimum-norm: the nearest adversarial example, for one gradient a step.

Threat: linf, l2, l1, l0; with a budget, or without (as near as possible). Access: gradients.
Source: Pintor, Roli, Brendel and Biggio 2021, "Fast Minimum-norm Adversarial Attacks through Adaptive Norm
Constraints" (2102.12827). Each sample has a radius of its own: the first-order estimate of the distance to the
boundary until something adversarial is met, and from then on a little less after each success, a little more after
each failure.
Departures: steps are projected on ball and image bounds at once, not on one after the other, so that clipping does not
shorten them; the last point is judged too (one pass more than `steps`); with a budget, the radius never exceeds it;
l0 counts pixels unless the threat counts coordinates, and its radius never falls below 1; no adversarial starting
points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self, cast

import torch
from torch import Tensor

from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.goals import Goal
from robustbench_lite.core.losses import margin
from robustbench_lite.core.norms import NORMS
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["FMN"]


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
            value, gradient = oracle.gradient(search.points, rows, margin)
            length, share = self._schedule(step)
            search = search.with_radius(oracle.verdict, value, gradient, share).stepped(length, gradient)
        keep = oracle.still(rows, oracle.judge_cost)
        if len(keep):
            oracle.judge(search.points[keep], rows[keep], margin)
        return oracle.best

    def _schedule(self, step: int) -> tuple[float, float]:
        """Return the l2 length of this step, and the share by which radii change."""
        cosine = (1 + math.cos(math.pi * step / self.steps)) / 2
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
    def with_radius(self, fooled: Tensor, value: Tensor, gradient: Tensor, share: float) -> Self:
        """Return the search with its radius moved by what the model said at `points`."""
        distance = self.threat.distance(self.points, self.x).to(self.radius.dtype)
        nearest = torch.where(fooled, torch.minimum(self.nearest, distance), self.nearest)
        if self.threat.norm == "l0":
            smaller = torch.minimum(self.radius - 1, (self.radius * (1 - share)).floor())
            larger = torch.maximum(self.radius + 1, (self.radius * (1 + share)).floor())
            radius = torch.where(fooled, torch.minimum(smaller, nearest), larger).clamp_min(1)
        else:
            slope = NORMS[self.threat.dual_norm].size(gradient)
            reach = distance + value.abs() / slope.clamp_min(torch.finfo(slope.dtype).tiny)
            missed = torch.where(nearest.isfinite(), self.radius * (1 + share), reach)
            radius = torch.where(fooled, torch.minimum(self.radius * (1 - share), nearest), missed)
        return replace(self, radius=torch.minimum(radius, self.widest), nearest=nearest)

    @torch.no_grad()
    def stepped(self, length: float, gradient: Tensor) -> Self:
        """Return the search after a step of l2 `length` along the gradient, inside the radius and the bounds."""
        moved = self.points + length * NORMS["l2"].steepest(gradient, None)
        return replace(self, points=replace(self.threat, eps=self.radius).project(moved, self.x))
