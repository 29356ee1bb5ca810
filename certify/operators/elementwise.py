"""Sums, differences, products and quotients, elementwise, with broadcasting.

Two varying terms may be added and subtracted: [l + l', u + u'] and [l - u', u - l']. A product or quotient needs one
fixed operand: centre k c, radius |k| r.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from robustbench_lite.certify.intervals import Ball, Interval
from robustbench_lite.certify.ir import Node
from robustbench_lite.certify.operators.registry import Build, Value, interval, spelled

__all__ = ["scaled"]

aten = torch.ops.aten


@spelled(operator.add, operator.iadd, torch.add, aten.add.Tensor, aten.add.Scalar, methods=("add", "__add__"))
@spelled(aten.add_.Tensor, aten.add_.Scalar, methods=("add_", "__iadd__", "__radd__"))
def lower_add(build: Build, z: Any, other: Any, *, alpha: float = 1) -> Node:
    """Bring sums in."""
    return build.apply("add", z, _times(build, other, alpha))


@spelled(operator.sub, operator.isub, torch.sub, torch.subtract, aten.sub.Tensor, aten.sub.Scalar)
@spelled(aten.sub_.Tensor, aten.sub_.Scalar, methods=("sub", "subtract", "__sub__", "sub_", "__isub__"))
def lower_sub(build: Build, z: Any, other: Any, *, alpha: float = 1) -> Node:
    """Bring differences in."""
    return build.apply("sub", z, _times(build, other, alpha))


@spelled(torch.rsub, aten.rsub.Tensor, aten.rsub.Scalar, methods=("__rsub__",))
def lower_rsub(build: Build, z: Any, other: Any, alpha: float = 1) -> Node:
    """Bring other - alpha * input in."""
    return build.apply("sub", other, _times(build, z, alpha))


@spelled(operator.neg, torch.neg, aten.neg.default, methods=("neg", "__neg__"))
def lower_neg(build: Build, z: Any) -> Node:
    """Bring -z in, as a product."""
    return build.apply("mul", z, -1.0)


@spelled(operator.mul, operator.imul, torch.mul, torch.multiply, aten.mul.Tensor, aten.mul.Scalar)
@spelled(aten.mul_.Tensor, aten.mul_.Scalar, methods=("mul", "multiply", "__mul__", "__rmul__", "mul_", "__imul__"))
def lower_mul(build: Build, z: Any, other: Any) -> Node:
    """Bring products with a fixed factor in."""
    if isinstance(z, Node) and z.varies:
        z, other = other, z
    if isinstance(z, Node) and z.varies:
        raise build.refuse("a product of two values that both depend on the input")
    return build.apply("mul", other, z)


@spelled(operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide, aten.div.Tensor)
@spelled(aten.div.Scalar, aten.div_.Tensor, aten.div_.Scalar, methods=("div", "divide", "true_divide", "div_"))
@spelled(methods=("__truediv__", "__itruediv__"))
def lower_div(build: Build, z: Any, other: Any, *, rounding_mode: str | None = None) -> Node:
    """Bring quotients with a fixed divisor in."""
    if rounding_mode is not None or (isinstance(other, Node) and other.varies):
        raise build.refuse("a quotient is supported where the divisor is fixed and nothing is rounded")
    return build.apply("div", z, other)


def _times(build: Build, other: Any, alpha: float) -> Any:
    if alpha == 1:
        return other
    if not isinstance(other, Node):
        return other * alpha
    if other.varies:
        return build.apply("mul", other, alpha, shape=other.shape)
    return build.apply("compute", other, call=lambda value: value * alpha, shape=other.shape)


def scaled(z: Interval, factor: Tensor, shift: Tensor | None = None) -> Interval:
    """Return the box around factor * z + shift."""
    centre = z.centre * factor if shift is None else z.centre * factor + shift
    ball = None
    if z.ball is not None and centre.shape == z.lower.shape:
        ball = z.ball.affine(factor, shift)
    return Interval.around(centre, z.radius * factor.abs(), ball)


def _shifted(z: Interval, shift: Tensor) -> Interval:
    lower = z.lower + shift
    ball = z.ball.affine(shift=shift) if z.ball is not None and lower.shape == z.lower.shape else None
    return Interval(lower, z.upper + shift, ball)


@interval("add")
def interval_add(node: Node, a: Value, b: Value) -> Interval:
    """Return the box around a + b."""
    if isinstance(a, Interval):
        return Interval(a.lower + b.lower, a.upper + b.upper) if isinstance(b, Interval) else _shifted(a, b)
    if isinstance(b, Interval):
        return _shifted(b, a)
    raise TypeError("a sum of two fixed values is no node of its own")


@interval("sub")
def interval_sub(node: Node, a: Value, b: Value) -> Interval:
    """Return the box around a - b."""
    if isinstance(b, Tensor):
        return interval_add(node, a, -b)
    if isinstance(a, Tensor):
        return _shifted(scaled(b, torch.tensor(-1.0, dtype=a.dtype, device=a.device)), a)
    return Interval(a.lower - b.upper, a.upper - b.lower)


@interval("mul")
def interval_mul(node: Node, z: Value, factor: Value) -> Interval:
    """Return the box around factor * z."""
    if not isinstance(z, Interval) or not isinstance(factor, Tensor):
        raise TypeError("a product needs one fixed factor")
    return scaled(z, factor)


@interval("div")
def interval_div(node: Node, z: Value, divisor: Value) -> Interval:
    """Return the box around z / divisor."""
    if not isinstance(z, Interval) or not isinstance(divisor, Tensor):
        raise TypeError("a quotient needs a fixed divisor")
    centre, ball = z.centre / divisor, None
    if z.ball is not None and centre.shape == z.lower.shape:
        ball = Ball(z.ball.norm, z.ball.eps, z.ball.centre / divisor, z.ball.scale / divisor)
    return Interval.around(centre, z.radius / divisor.abs(), ball)
