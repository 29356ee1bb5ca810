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
its radius never falls below 1; the search from adversarial starting points is an attack of its own, `FarFMN`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import cast

from torch import Tensor

from robustbench_lite.attacks._closing_in import Search, soft_margin
from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.goals import Goal
from robustbench_lite.core.losses import margin
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
        self._close_in(oracle, rows, Search.start(x[rows], cast(Lp, threat).take(rows)))
        return oracle.best

    def _close_in(self, oracle: Oracle, rows: Tensor, search: Search) -> None:
        """Take the steps of the searches for `rows` (n,), and judge where each of them ends."""
        for step in range(self.steps):
            if step % oracle.compact_every == 0:
                keep = oracle.still(rows, oracle.gradient_cost)
                rows, search = rows[keep], search.take(keep)
            if len(rows) == 0:
                return
            cosine = (1 + math.cos(math.pi * step / self.steps)) / 2
            value, gradient = oracle.gradient(search.points, rows, partial(soft_margin, temperature=cosine))
            search = search.step(oracle.verdict, value, gradient, *self._sizes(cosine, search))
        keep = oracle.still(rows, oracle.judge_cost)
        if len(keep):
            oracle.judge(search.points[keep], rows[keep], margin)

    def _sizes(self, cosine: float, search: Search) -> tuple[float | Tensor, float]:
        """Return the l2 length of a step, for all or (n, 1, 1, 1), and the share by which radii change."""
        final = self.alpha_init / 100 if self.alpha_final is None else self.alpha_final
        return (
            final + (self.alpha_init - final) * cosine,
            self.gamma_final + (self.gamma_init - self.gamma_final) * cosine,
        )
