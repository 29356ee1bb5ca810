"""ReLU and leaky ReLU: two straight pieces that meet at 0.

The line through both ends lies on the outer side of the kink, and every line through the origin with a slope between
those of the two pieces on the inner side. Where the interval does not hold 0 in its inside, both lines are the piece.

The choice of the inner line is CROWN's (Zhang, Weng, Chen, Hsieh, Daniel 2018, arXiv 1811.00866, "adaptive"): the
piece that covers more of the interval. The outer line is moved outwards by a few units of rounding of the larger end
times the larger slope, so that it holds in real arithmetic (numbers that underflow left aside).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.ir import Node
from robustbench_lite.certify.lines import Lines
from robustbench_lite.certify.operators._activations import activation, varying
from robustbench_lite.certify.operators.registry import Build, Value, interval, layer, lines, spelled

__all__: list[str] = []

aten = torch.ops.aten

activation("relu", torch.relu, nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, aten.relu.default, aten.relu_.default)


@spelled(F.leaky_relu, F.leaky_relu_, torch._C._nn.leaky_relu, aten.leaky_relu.default, aten.leaky_relu_.default)
def lower_leaky_relu(build: Build, z: Any, negative_slope: float = 0.01, inplace: bool = False) -> Node:
    """Bring leaky_relu in."""
    if negative_slope < 0:
        raise build.refuse(f"leaky_relu with a negative slope ({negative_slope}) is not monotone")
    return build.apply("leaky_relu", z, negative_slope=negative_slope)


@layer(nn.LeakyReLU)
def lower_leaky_relu_layer(build: Build, module: nn.LeakyReLU, z: Node) -> Node:
    """Bring nn.LeakyReLU in."""
    return lower_leaky_relu(build, z, module.negative_slope)


@interval("leaky_relu")
def interval_leaky_relu(node: Node, z: Value) -> Interval:
    """Return the image of the box."""
    return varying(z).monotone(lambda t: F.leaky_relu(t, node.attributes["negative_slope"]))


@lines("relu")
def lines_relu(node: Node, z: Interval) -> Lines:
    """Return the lines around relu: above u (t - l) / (u - l), below t or 0, t where u >= -l."""
    unit, tiny = torch.finfo(z.lower.dtype).eps, torch.finfo(z.lower.dtype).tiny
    lower, upper = z.lower.clamp_max(0), z.upper.clamp_min(0)
    width = F.threshold(upper - lower, tiny, 1.0)  # 1 where l = u = 0: slope 0, and a gradient without 0 / 0
    slope = (upper / width * (1 + 4 * unit)).clamp_max(1)  # 1 is above the kink whatever the shift
    shift = torch.addcmul(slope.new_zeros(()), lower, slope, value=-1 - 4 * unit)
    inner = torch.ge(slope.detach(), 0.5, out=torch.empty_like(slope))  # half the time of a mask and its conversion
    return Lines(inner, _zeros(inner), slope, shift, free=shift > 0)


@lines("leaky_relu")
def lines_leaky_relu(node: Node, z: Interval) -> Lines:
    """Return the lines around leaky relu, s t + (1 - s) relu(t): from those of relu, mirrored where s > 1 (concave)."""
    left = float(node.attributes["negative_slope"])
    relu = lines_relu(node, z)
    ends = torch.tensor([left, 1.0], dtype=z.lower.dtype, device=z.lower.device)
    inner, outer = (torch.lerp(ends[0], ends[1], slope) for slope in (relu.lower_slope, relu.upper_slope))
    unit = 8 * torch.finfo(z.lower.dtype).eps * max(1.0, left)
    margin = unit * outer * (z.upper - z.lower) * relu.upper_shift.sign()
    if left <= 1:
        shift = (1 - left) * relu.upper_shift + margin
        return Lines(inner, relu.lower_shift, outer, shift, relu.free, least=left, most=1.0)
    return Lines(outer, (1 - left) * relu.upper_shift - margin, inner, relu.lower_shift)


def _zeros(like: Tensor) -> Tensor:
    return like.new_zeros(()).expand(like.shape)
