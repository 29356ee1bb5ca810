"""ELU: alpha (exp(t) - 1) below 0, t above it; for alpha > 1 its slope falls at 0 and it is no longer convex.

alpha <= 1 (convex): above, the chord; below, the tangent at the middle of the interval, as CROWN does for convex
functions (Zhang et al. 2018, arXiv 1811.00866). alpha > 1: -f(-t) is convex below 0 and concave above it, so the line
below is that of `_tangents`; above, the side over the middle of the triangle (l, f(l)), (0, 0), (u, u), where its
corner at 0 is above the chord. A line is always moved to the extreme of f less it, and outwards by the rounding that
`_tangents` states; where l >= 0 it is t itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.ir import Node
from robustbench_lite.certify.lines import Lines
from robustbench_lite.certify.operators._activations import varying
from robustbench_lite.certify.operators._tangents import (
    Curve,
    Ends,
    between,
    chord,
    line_above,
    narrow_width,
    over_corner,
    resting,
    where,
)
from robustbench_lite.certify.operators.registry import Build, Value, interval, layer, lines, spelled

__all__: list[str] = []

aten = torch.ops.aten
STEPS = 4
EDGE = 1e-30  # a line from 0 touches at 0: no division by 0


@spelled(F.elu, F.elu_, torch._C._nn.elu_, aten.elu.default, aten.elu_.default)
def lower_elu(
    build: Build, z: Any, alpha: float = 1.0, scale: float = 1, input_scale: float = 1, inplace: bool = False
) -> Node:
    """Bring elu in."""
    if alpha < 0 or scale != 1 or input_scale != 1:
        raise build.refuse(f"elu is supported for alpha >= 0 and unit scales, got {alpha}, {scale}, {input_scale}")
    return build.apply("elu", z, alpha=alpha)


@spelled(F.elu)
def lower_functional_elu(build: Build, z: Any, alpha: float = 1.0, inplace: bool = False) -> Node:
    """Bring F.elu in: its third argument is `inplace`."""
    return lower_elu(build, z, alpha)


@layer(nn.ELU)
def lower_elu_layer(build: Build, module: nn.ELU, z: Node) -> Node:
    """Bring nn.ELU in."""
    return lower_elu(build, z, module.alpha)


@interval("elu")
def interval_elu(node: Node, z: Value) -> Interval:
    """Return the image of the box."""
    return varying(z).monotone(lambda t: F.elu(t, node.attributes["alpha"]))


@lines("elu")
def lines_elu(node: Node, z: Interval) -> Lines:
    """Return the lines around elu."""
    alpha = float(node.attributes["alpha"])
    ends = Ends.of(z.lower, z.upper, lambda t: F.elu(t, alpha))
    curved = where(torch.lt, z.lower, 0.0)
    bent = curved * where(torch.gt, z.upper, 0.0)
    narrow = where(torch.lt, ends.width, narrow_width(z.lower)) * (1 - bent)
    tangent = _slope(ends.centre, alpha)
    outer = torch.lerp(chord(ends), tangent, narrow)
    if alpha <= 1:
        middle = (-ends.centre, -F.elu(ends.centre, alpha))
        return between(resting(tangent, ends.turned(), [middle], curved), resting(outer, ends, (), curved))
    corner = torch.zeros_like(outer)
    outer = over_corner(outer, ends, bent, corner, corner)
    inside = torch.clamp(corner, z.lower, z.upper)  # 0, or the end that is nearer to it
    above = resting(outer, ends, [(inside, F.elu(inside, alpha))], curved)
    return between(line_above(_turned(alpha), ends.turned(), curved), above)


def _slope(t: Tensor, alpha: float) -> Tensor:
    """The derivative; alpha at 0."""
    return torch.lerp(alpha * torch.exp(t.clamp_max(0)), torch.ones_like(t), where(torch.gt, t, 0.0))


def _turned(alpha: float) -> Curve:
    """-f(-t) for alpha > 1; a line from (-b, -b) touches it where exp(-q) (b + 1 + q) = (b + alpha) / alpha."""

    def touching(base: Tensor, value: Tensor) -> Tensor:
        distance = (-base).clamp_min(0)
        target = torch.log1p(distance / alpha)
        point = (2 * (1 - 1 / alpha) * distance).sqrt().clamp_max(math.log(alpha))  # right for small b and for large
        for _ in range(STEPS):
            over = torch.log1p(distance + point) - point - target
            point = point + over * ((distance + point + 1) / (distance + point).clamp_min(EDGE))
        return point.clamp_min(0)

    return Curve(lambda t: -F.elu(-t, alpha), lambda t: _slope(-t, alpha), 0.0, touching)
