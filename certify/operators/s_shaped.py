"""tanh, sigmoid and arctan: convex below 0, concave above it; lines by the rule of `_tangents`.

The line from (-b, f(-b)) touches the concave part where slope f'(q) = (f(q) + f(b)) / (q + b), for the odd ones.
Inverting f' at the slope of the line through the last q (Dinkelbach's iteration) converges quadratically: from the
starts below, two steps leave a relative error of q below 1e-6.
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
from robustbench_lite.certify.operators._activations import activation
from robustbench_lite.certify.operators._tangents import Curve, Ends, lines_around
from robustbench_lite.certify.operators.registry import Build, lines, spelled

__all__: list[str] = []

aten = torch.ops.aten
STEPS = 2

activation("tanh", torch.tanh, nn.Tanh, torch.tanh, F.tanh, torch.tanh_, aten.tanh.default, aten.tanh_.default)
activation(
    "sigmoid",
    torch.sigmoid,
    nn.Sigmoid,
    torch.sigmoid,
    F.sigmoid,
    torch.sigmoid_,
    aten.sigmoid.default,
    torch.special.expit,
)
activation("arctan", torch.atan, None, torch.atan, torch.arctan, aten.atan.default, aten.arctan.default)


@spelled(methods=("atan", "atan_"))
def lower_atan(build: Build, z: Any) -> Node:
    """Bring in arctan under the shorter of its names."""
    return build.apply("arctan", z)


@lines("tanh")
def lines_tanh(node: Node, z: Interval) -> Lines:
    """Return the lines around tanh."""
    curve = Curve(torch.tanh, _sech2, 0.0, _touching_tanh)
    return lines_around(curve, curve, Ends.of(z.lower, z.upper, curve.value))


@lines("sigmoid")
def lines_sigmoid(node: Node, z: Interval) -> Lines:
    """Return the lines around the sigmoid, 1/2 + tanh(t / 2) / 2."""
    curve = Curve(torch.sigmoid, _sigmoid_slope, 0.0, lambda t, at: 2 * _touching_tanh(t / 2, 2 * at - 1))
    turned = Curve(_turned_sigmoid, _sigmoid_slope, 0.0, lambda t, at: 2 * _touching_tanh(t / 2, 2 * at + 1))
    return lines_around(curve, turned, Ends.of(z.lower, z.upper, curve.value))


@lines("arctan")
def lines_arctan(node: Node, z: Interval) -> Lines:
    """Return the lines around arctan."""
    curve = Curve(torch.atan, _arctan_slope, 0.0, _touching_arctan)
    return lines_around(curve, curve, Ends.of(z.lower, z.upper, curve.value))


def _sech2(t: Tensor) -> Tensor:
    """1 / cosh(t)^2, to a few units of rounding of itself also where tanh(t) rounds to 1."""
    small = torch.exp(-2 * t.abs())
    return 4 * small / (1 + small).square()


def _sigmoid_slope(t: Tensor) -> Tensor:
    return _sech2(t / 2) / 4


def _turned_sigmoid(t: Tensor) -> Tensor:
    return -torch.sigmoid(-t)


def _arctan_slope(t: Tensor) -> Tensor:
    return 1 / (1 + t.square())


def _touching_tanh(base: Tensor, value: Tensor) -> Tensor:
    """Start from log(1 + b + 1.1 b^2 / (1 + b)) / 2: at most 5 % off. b / 2 is always too far."""
    distance, value = (-base).clamp_min(0), (-value).clamp_min(0)
    grown = distance + 1.1 * distance * (distance / (1 + distance))  # exp(2 q) - 1
    point, touched = torch.log1p(grown) / 2, grown / (grown + 2)
    for _ in range(STEPS):
        slope = _through(distance, value, point, touched)
        touched = (1 - slope).clamp_min(0).sqrt()
        point = torch.minimum(((1 + touched).square() / slope).log() / 2, distance / 2)
    return point


def _touching_arctan(base: Tensor, value: Tensor) -> Tensor:
    """Start from b / sqrt(4 + pi b^2 / (b + 2.5)): at most 5 % off. b / 2 is always too far."""
    distance, value = (-base).clamp_min(0), (-value).clamp_min(0)
    point = distance / (4 + math.pi * distance * (distance / (distance + 2.5))).sqrt()
    for _ in range(STEPS):
        slope = _through(distance, value, point, torch.atan(point))
        point = torch.minimum((1 / slope - 1).clamp_min(0).sqrt(), distance / 2)
    return point


def _through(distance: Tensor, value: Tensor, point: Tensor, touched: Tensor) -> Tensor:
    """Return the slope of the line from (-distance, -value) to (point, touched)."""
    return (touched + value) / (point + distance).clamp_min(torch.finfo(point.dtype).tiny)
