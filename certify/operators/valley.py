"""GELU and SiLU: they fall to one minimum and rise after it.

The image of [l, u] ends above at the larger end value; below at the minimum where the interval holds it, else at the
smaller end value. The minima are computed to more digits than float64 has and rounded down.

Lines: each is t / 2 + h(t) with h even, rising with |t|, convex between its inflections -c and c and concave outside.
An interval is first mirrored to have its middle right of 0. Then the lines around h are those of `_tangents`: on the
left concave part, if the interval reaches it at all, h falls, so h less a rising line is largest at the left end. The
touching points are found by Newton steps, from starts that are right to first order at c and in the limit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.ir import Node
from robustbench_lite.certify.lines import Lines
from robustbench_lite.certify.operators._activations import varying
from robustbench_lite.certify.operators._even import EVEN
from robustbench_lite.certify.operators._tangents import Curve, Ends, Function, line_above
from robustbench_lite.certify.operators.registry import Build, Value, interval, layer, lines, spelled

__all__ = ["MINIMA"]

aten = torch.ops.aten
MINIMA = {  # where the minimum is, and a number just below its value
    "gelu": (-0.7517915246935645, -0.1699712074799037),
    "gelu_tanh": (-0.7524614220710163, -0.1700407505712541),
    "silu": (-1.2784645427610737, -0.27846454276107385),
}


@spelled(F.gelu, torch._C._nn.gelu, aten.gelu.default)
def lower_gelu(build: Build, z: Any, approximate: str = "none") -> Node:
    """Bring gelu in."""
    return build.apply("gelu" if approximate == "none" else "gelu_tanh", z)


@layer(nn.GELU)
def lower_gelu_layer(build: Build, module: nn.GELU, z: Node) -> Node:
    """Bring nn.GELU in."""
    return lower_gelu(build, z, module.approximate)


@spelled(F.silu, torch._C._nn.silu, aten.silu.default, aten.silu_.default)
def lower_silu(build: Build, z: Any, inplace: bool = False) -> Node:
    """Bring silu in."""
    return build.apply("silu", z)


@layer(nn.SiLU)
def lower_silu_layer(build: Build, module: nn.SiLU, z: Node) -> Node:
    """Bring nn.SiLU in."""
    return lower_silu(build, z)


@interval("gelu")
def interval_gelu(node: Node, z: Value) -> Interval:
    """Return the image of the box."""
    return _image(z, "gelu", F.gelu)


@interval("gelu_tanh")
def interval_gelu_tanh(node: Node, z: Value) -> Interval:
    """Return the image of the box."""
    return _image(z, "gelu_tanh", lambda t: F.gelu(t, approximate="tanh"))


@interval("silu")
def interval_silu(node: Node, z: Value) -> Interval:
    """Return the image of the box."""
    return _image(z, "silu", F.silu)


def _image(z: Value, name: str, function: Function) -> Interval:
    z = varying(z)
    bottom, value = MINIMA[name]
    at_lower, at_upper = function(z.lower), function(z.upper)
    held = (z.lower <= bottom) & (z.upper >= bottom)
    lower = torch.where(held, value, torch.minimum(at_lower, at_upper))
    return Interval(lower, torch.maximum(at_lower, at_upper))


@lines("gelu")
def lines_gelu(node: Node, z: Interval) -> Lines:
    """Return the lines around gelu."""
    return _lines(z, "gelu", F.gelu)


@lines("gelu_tanh")
def lines_gelu_tanh(node: Node, z: Interval) -> Lines:
    """Return the lines around the approximation of gelu by tanh."""
    return _lines(z, "gelu_tanh", lambda t: F.gelu(t, approximate="tanh"))


@lines("silu")
def lines_silu(node: Node, z: Interval) -> Lines:
    """Return the lines around silu."""
    return _lines(z, "silu", F.silu)


def _lines(z: Interval, name: str, function: Function) -> Lines:
    even = EVEN[name]
    side = (z.lower + z.upper).sign()  # 0: both lines around h are level
    ends = Ends.of(torch.maximum(z.lower, -z.upper), torch.maximum(z.upper, -z.lower), even.value)
    above = line_above(Curve(even.value, even.slope, even.inflection, even.touching_tail), ends)
    turned = Curve(
        lambda t: -even.value(t), lambda t: even.slope(-t), -even.inflection, even.touching_bowl, even.inflection
    )
    below = line_above(turned, ends.turned())
    some, unit = ends.width.detach().sign(), 4 * torch.finfo(side.dtype).eps
    near = z.lower.clamp(-50, 50)  # f is 0 or t beyond, but torch's gradient is NaN where t^3 overflows
    at = function(near) + (z.lower - near).clamp_min(0)

    def whole(slope: Tensor, shift: Tensor, outwards: float) -> tuple[Tensor, Tensor]:
        rounding = outwards * unit * ends.upper  # of t / 2, and of adding 1 / 2 to the slope
        return (slope * side + 0.5) * some, torch.lerp(at, shift + rounding, some)

    upper_slope, upper_shift = whole(*above, 1.0)
    lower_slope, lower_shift = whole(below[0], -below[1], -1.0)
    return Lines(lower_slope, lower_shift, upper_slope, upper_shift)
