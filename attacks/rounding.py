"""Which adversarial examples survive being stored: images have 256 levels, and attacks search real numbers.

Source: the check is that of Carlini and Wagner 2016 (1608.04644, section "discretization"), who round and look again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustbench_lite.core.goals import Goal, as_goal
from robustbench_lite.core.models import Model
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.results import AttackResult
from robustbench_lite.core.threats import TOLERANCE, Lp, Threat

__all__ = ["survives_rounding"]


def survives_rounding(
    model: Model,
    result: AttackResult,
    x: Tensor,
    goal: Goal | Tensor,
    threat: Threat,
    levels: int = 256,
    *,
    memory_budget: int | None = None,
) -> Tensor:
    """Return bool (B,): which successes are still successes after rounding to `levels` values; one forward pass each.

    Each image is rounded to the nearest of the levels, equally spaced from the lowest to the highest value of the
    threat's bounds. Where that leaves the threat, it is rounded to feasible values instead: for linf to the nearest
    level of the ball, entry by entry; for other norms towards the clean image, which stays inside if the clean image
    itself lies on levels. A success survives if the rounded image lies in the threat and the deployed model still
    falls. For a parametric threat the image alone is rounded, and membership stays with the parameters.

    Args:
        model: the deployed model.
        result: what an attack answered.
        x: the clean images (B, C, H, W) that it was given.
        goal: the goal, or labels int64 (B,).
        threat: the threat that it was given.
        levels: number of values an entry can take; 256 is 8 bits.
        memory_budget: bytes that questions to the model may take, as for an attack.

    Raises:
        ValueError: fewer than 2 levels, or another number of images than of results.
    """
    if not isinstance(levels, int) or levels < 2:
        raise ValueError(f"levels must be a whole number, at least 2, got {levels!r}")
    if x.shape != result.x_adv.shape:
        raise ValueError(f"x must be the images of the attack, {tuple(result.x_adv.shape)}, got {tuple(x.shape)}")
    survived = torch.zeros_like(result.success)
    rows = result.success.nonzero().flatten()
    clean, part, image = x[rows], threat.take(rows), result.x_adv[rows]
    if threat.parametric:
        rounded = _Levels(threat, levels).nearest(image)
    else:
        rounded = _rounded(image, clean, part, _Levels(threat, levels))
        inside = part.contains(rounded, clean).nonzero().flatten()
        rows, clean, rounded = rows[inside], clean[inside], rounded[inside]
    if len(rows) == 0:
        return survived
    anywhere = Lp("linf", None, threat.bounds)
    part_goal = as_goal(goal).take(rows)
    with Oracle(model, clean, part_goal, anywhere, access=Access.LABEL, memory_budget=memory_budget) as oracle:
        oracle.labels(rounded, torch.arange(len(rows), device=x.device))
        survived[rows] = oracle.verdict
    return survived


class _Levels:
    """The values an entry can take, counted from 0: low, low + step, ..., high. Counting is done in float64."""

    def __init__(self, threat: Threat, levels: int) -> None:
        self.low, high = threat.bounds
        self.last, self.step = levels - 1, (high - self.low) / (levels - 1)

    def count(self, x: Tensor) -> Tensor:
        """Return how many steps each entry lies above the lowest level, a real number."""
        return (x.double() - self.low) / self.step

    def value(self, count: Tensor, like: Tensor) -> Tensor:
        return (self.low + self.step * count.clamp(0, self.last)).to(like.dtype)

    def nearest(self, x: Tensor) -> Tensor:
        return self.value(self.count(x).round(), x)

    def towards(self, clean: Tensor, x: Tensor) -> Tensor:
        """Return the nearest level on the way from each entry to the clean one, or where there is none the nearest."""
        count, goal = self.count(x), self.count(clean)
        slack = TOLERANCE / 2 / self.step
        level = torch.where(goal < count, (count + slack).floor(), (count - slack).ceil())
        passed = torch.where(goal < count, level < goal - slack, level > goal + slack)
        return self.value(torch.where(passed, count.round(), level), x)

    def within(self, lower: Tensor, upper: Tensor, x: Tensor) -> Tensor:
        """Return the level nearest to each entry in [lower, upper], or where there is none the nearest at all."""
        slack = TOLERANCE / 2 / self.step
        first, final = (self.count(lower) - slack).ceil(), (self.count(upper) + slack).floor()
        nearest = self.count(x).round()
        return self.value(torch.where(first <= final, nearest.clamp(first, final), nearest), x)


def _rounded(x_adv: Tensor, clean: Tensor, threat: Threat, levels: _Levels) -> Tensor:
    nearest = levels.nearest(x_adv)
    if isinstance(threat, Lp) and threat.norm == "linf" and threat.eps is not None:
        exact = clean.double()
        radius = threat.radius(exact)
        inner = levels.within(exact - radius, exact + radius, x_adv)
    else:
        inner = levels.towards(clean, x_adv)
    outside = ~threat.contains(nearest, clean)
    return torch.where(outside.reshape(-1, 1, 1, 1), inner, nearest)
