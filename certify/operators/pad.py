"""Padding, with a constant (new coordinates that do not vary) or with copies of the image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.certify.intervals import Ball, Interval
from robustbench_lite.certify.ir import Node
from robustbench_lite.certify.operators.registry import Build, Pulled, Value, interval, layer, linear, spelled
from robustbench_lite.certify.rows import OneHot, Patch, Rows
from robustbench_lite.certify.transpose import transposed

__all__: list[str] = []

aten = torch.ops.aten


@spelled(F.pad, torch.constant_pad_nd, torch._C._nn.pad, aten.pad.default)
def lower_pad(build: Build, z: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Node:
    """Bring F.pad in."""
    return build.apply("pad", z, sides=tuple(pad), mode=mode, value=float(value or 0.0))


@spelled(aten.constant_pad_nd.default)
def lower_constant(build: Build, z: Any, pad: Any, value: float = 0) -> Node:
    """Bring ATen's constant padding in."""
    return lower_pad(build, z, pad, value=value)


@layer(nn.ZeroPad2d, nn.ConstantPad2d)
def lower_layer(build: Build, module: nn.ConstantPad2d, z: Node) -> Node:
    """Bring nn.ZeroPad2d and nn.ConstantPad2d in."""
    return lower_pad(build, z, module.padding, value=module.value)


@interval("pad")
def interval_pad(node: Node, z: Value) -> Interval:
    """Return the padded box. Copies repeat coordinates of the ball, whose norm then no longer bounds them: it goes."""
    if isinstance(z, Tensor):
        raise TypeError("a padded fixed value is no node of its own")
    sides, mode, value = (node.attributes[name] for name in ("sides", "mode", "value"))
    if mode != "constant":
        return z.monotone(lambda t: F.pad(t, sides, mode))
    ball = None
    if z.ball is not None:
        ball = Ball(z.ball.norm, z.ball.eps, F.pad(z.ball.centre, sides, value=value), F.pad(z.ball.scale, sides))
    return Interval(F.pad(z.lower, sides, value=value), F.pad(z.upper, sides, value=value), ball)


@linear("pad")
def linear_pad(node: Node, rows: Rows, z: Interval) -> Pulled:
    """Return the rows without the coordinates that padding added; a constant there is a shift."""
    sides, mode, value = (node.attributes[name] for name in ("sides", "mode", "value"))
    shape = tuple(z.lower.shape[1:])
    if mode != "constant":
        return (transposed(lambda t: F.pad(t, sides, mode), rows, shape),), None
    shift = None
    if value != 0:
        shift = rows.dot(F.pad(torch.zeros_like(z.lower[:1]), sides, value=value))
    if isinstance(rows, OneHot) and len(shape) == 3:
        rows = rows.patch()
    if isinstance(rows, Patch):
        return (_cropped(rows, sides, shape),), shift
    return (transposed(lambda t: F.pad(t, sides), rows, shape),), shift


def _cropped(rows: Patch, sides: tuple[int, ...], shape: tuple[int, ...]) -> Rows:
    """Return windows of a padded map as windows of the map."""
    left, _, top, _, front, back = (*sides, 0, 0, 0, 0)[:6]
    values = F.pad(rows.values, (0, 0, 0, 0, -front, -back)) if front or back else rows.values
    offset = rows.offset[0] - top, rows.offset[1] - left
    return replace(rows, values=values, shape=shape, offset=offset).trimmed()
