"""Sums, differences, products and quotients, elementwise, with broadcasting.

Two varying terms may be added and subtracted: [l + l', u + u'] and [l - u', u - l']. A product or quotient needs one
fixed operand: centre k c, radius |k| r.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from robustbench_lite.certify.intervals import Ball, Interval
from robustbench_lite.certify.ir import Node
from robustbench_lite.certify.operators.registry import Build, Pulled, Value, interval, linear, spelled
from robustbench_lite.certify.rows import Rows
from robustbench_lite.certify.transpose import transposed

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


@linear("add")
def linear_add(node: Node, rows: Rows, a: Value, b: Value) -> Pulled:
    """Return the rows for every varying term; a fixed one is a shift."""
    return _terms(rows, rows, a, b)


@linear("sub")
def linear_sub(node: Node, rows: Rows, a: Value, b: Value) -> Pulled:
    """Return the rows for the first term and their negative for the second."""
    return _terms(rows, replace(rows, values=-rows.values), a, b)


@linear("mul")
def linear_mul(node: Node, rows: Rows, z: Interval, factor: Tensor) -> Pulled:
    """Return the rows times the factor."""
    return (_over(z, rows.scaled(_aligned(factor, rows))), None), None


@linear("div")
def linear_div(node: Node, rows: Rows, z: Interval, divisor: Tensor) -> Pulled:
    """Return the rows divided by the divisor."""
    return (_over(z, rows.scaled(_aligned(1 / divisor, rows))), None), None


def _terms(rows: Rows, second: Rows, a: Value, b: Value) -> Pulled:
    parts: list[Rows | None] = []
    shift: Tensor | None = None
    for own, value in ((rows, a), (second, b)):
        if isinstance(value, Interval):
            parts.append(_over(value, own))
        else:
            parts.append(None)
            shift = own.dot(_aligned(value, own))
    return tuple(parts), shift


def _aligned(value: Tensor, rows: Rows) -> Tensor:
    """Return a fixed operand with a batch dimension, so that it broadcasts to (1, *shape)."""
    missing = len(rows.shape) + 1 - value.ndim
    return value.reshape(*[1] * missing, *value.shape)


def _over(z: Interval, rows: Rows) -> Rows:
    """Return rows over a sum or product as rows over an operand that was broadcast to its shape."""
    shape = tuple(z.lower.shape[1:])
    if shape == rows.shape:
        return rows
    zero = z.lower.new_zeros(1, *rows.shape)
    return transposed(lambda t: t + zero, rows, shape)
