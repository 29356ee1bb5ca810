"""Softplus: log(1 + exp(beta z)) / beta, replaced by z itself above threshold / beta.

Each piece is monotone, and at the threshold torch's function falls by log(1 + exp(-threshold)) / beta: 2e-9 with the
defaults, 0.3 with a threshold of 1. An interval that holds the threshold counts both one-sided limits.

Lines, for the convex part those of CROWN (Zhang et al. 2018, arXiv 1811.00866): above, the chord; below, the tangent at
the middle. Where the threshold lies inside, the line above is the side over the middle of the triangle of both ends and
the limit from below, the highest point of f there; the line below is t if the middle is beyond the threshold, else the
tangent at the middle, or at d if that is left of it, where d's tangent goes through the lowest point at the threshold;
the line from (l, f(l)) through that point where d is left of l.
Slopes stay between 0 and 1, however steep the fall. Each line is moved to the extreme of f less it, and outwards by
the rounding that `_tangents` states.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.ir import Node
from robustbench_lite.certify.lines import Lines
from robustbench_lite.certify.operators._tangents import Ends, between, chord, narrow_width, over_corner, resting, where
from robustbench_lite.certify.operators.registry import Build, Value, interval, layer, lines, spelled

__all__: list[str] = []


@spelled(F.softplus, torch.ops.aten.softplus.default)
def lower_softplus(build: Build, z: Any, beta: float = 1, threshold: float = 20) -> Node:
    """Bring softplus in."""
    if beta <= 0:
        raise build.refuse(f"softplus is supported for beta > 0, got {beta}")
    return build.apply("softplus", z, beta=float(beta), threshold=float(threshold))


@layer(nn.Softplus)
def lower_layer(build: Build, module: nn.Softplus, z: Node) -> Node:
    """Bring nn.Softplus in."""
    return lower_softplus(build, z, module.beta, module.threshold)


@interval("softplus")
def interval_softplus(node: Node, z: Value) -> Interval:
    """Return the image of the box."""
    if isinstance(z, Tensor):
        raise TypeError("softplus of a fixed value is no node of its own")
    beta, threshold = node.attributes["beta"], node.attributes["threshold"]
    edge, before = _edge(beta, threshold)
    image = z.monotone(lambda t: F.softplus(t, beta, threshold))
    held = (z.lower <= edge) & (z.upper >= edge)
    lower = torch.where(held, image.lower.clamp_max(edge), image.lower)
    upper = torch.where(held, image.upper.clamp_min(before), image.upper)
    return Interval(lower, upper)


@lines("softplus")
def lines_softplus(node: Node, z: Interval) -> Lines:
    """Return the lines around softplus."""
    beta, threshold = node.attributes["beta"], node.attributes["threshold"]
    edge, before = _edge(beta, threshold)
    ends = Ends.of(z.lower, z.upper, lambda t: F.softplus(t, beta, threshold))
    doubt = 4 * torch.finfo(z.lower.dtype).eps * abs(edge)  # torch compares beta t with the threshold, rounded
    curved = where(torch.le, z.lower, edge + doubt)
    split = curved * where(torch.ge, z.upper, edge - doubt)
    beyond = where(torch.ge, ends.centre, edge)

    at, jump = torch.lerp(z.lower, torch.full_like(z.lower, edge), split), split * (before - edge)
    highest, lowest = torch.lerp(ends.at_lower, at + jump, split), torch.lerp(ends.at_lower, at, split)
    left = _lowest_tangent(threshold) / beta
    point = torch.maximum(ends.centre + (left - ends.centre).clamp_max(0) * split, z.lower)
    tangent = torch.sigmoid(beta * point)
    late = split * where(torch.gt, z.lower, left)  # no point has that tangent: the line through the lower end instead
    drop = (lowest - ends.at_lower) / F.threshold(at - z.lower, torch.finfo(at.dtype).eps, 1.0)
    tangent = torch.lerp(tangent, drop.clamp(0, 1), late)
    tangent = torch.lerp(tangent, torch.ones_like(tangent), beyond)

    narrow = where(torch.lt, ends.width, narrow_width(point)) * (1 - split)
    outer = over_corner(torch.lerp(chord(ends), tangent, narrow), ends, split, at, highest).clamp(0, 1)
    below = [(-point, -_smooth(point, beta)), (-at, -lowest)]
    return between(resting(tangent, ends.turned(), below, curved), resting(outer, ends, [(at, highest)], curved))


def _edge(beta: float, threshold: float) -> tuple[float, float]:
    """Return where the function jumps, and its limit from below there."""
    edge = threshold / beta
    return edge, edge + math.log1p(math.exp(-threshold)) / beta if threshold > -700 else 0.0


def _smooth(t: Tensor, beta: float) -> Tensor:
    """log(1 + exp(beta t)) / beta: its fall at 40 is below float64."""
    return F.softplus(t, beta, 40.0)


@cache
def _lowest_tangent(threshold: float) -> float:
    """Return beta d, where the tangent at d goes through (threshold, threshold) / beta; about threshold - 1."""
    low, high = min(threshold, 0.0) - 1e6, threshold
    for _ in range(100):
        middle = (low + high) / 2
        small = math.exp(-abs(middle))
        rest = math.log1p(small) + max(middle, 0.0) - threshold
        rest += (1 if middle > 0 else small) / (1 + small) * (threshold - middle)
        low, high = (middle, high) if rest < 0 else (low, middle)
    return low
