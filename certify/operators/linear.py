"""Linear: z -> W z + b. Centre W c + b, radius |W| r; at the input's Lp ball, radius eps * |row|_q."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.certify.intervals import Ball, Interval
from robustbench_lite.certify.ir import Node
from robustbench_lite.certify.operators.registry import Build, Pulled, Value, interval, layer, linear, spelled
from robustbench_lite.certify.rows import Dense, OneHot, Rows

__all__ = ["affine_image"]

aten = torch.ops.aten


@spelled(F.linear, torch._C._nn.linear, aten.linear.default)
def lower_linear(build: Build, z: Any, weight: Any, bias: Any = None) -> Node:
    """Bring F.linear in."""
    return build.apply("linear", z, weight, bias)


@layer(nn.Linear)
def lower_layer(build: Build, module: nn.Linear, z: Node) -> Node:
    """Bring nn.Linear in."""
    return build.apply("linear", z, build.parameter("weight"), build.parameter("bias"))


@spelled(torch.matmul, torch.mm, aten.matmul.default, aten.mm.default, methods=("matmul", "mm"))
def lower_matmul(build: Build, z: Any, other: Any) -> Node:
    """Bring z @ M in, for a fixed matrix M."""
    if not isinstance(other, Node) or other.varies or len(other.shape) != 2:
        raise build.refuse("a matrix product is supported where its right factor is a fixed matrix")
    turned = build.apply("compute", other, call=torch.t, shape=other.shape[::-1])
    return build.apply("linear", z, turned)


@interval("linear")
def interval_linear(node: Node, z: Value, weight: Value, bias: Value | None = None) -> Interval:
    """Return the box around W z + b."""
    if not isinstance(z, Interval) or not isinstance(weight, Tensor) or isinstance(bias, Interval):
        raise TypeError("only the input of a linear map may vary, not its weights")
    return affine_image(z, weight, bias)


def affine_image(z: Interval, weight: Tensor, bias: Tensor | None) -> Interval:
    """Return the box around W z + b.

    Args:
        z: (B, ..., I).
        weight: (O, I), or (B, O, I) with a matrix for each sample.
        bias: (O,) or (B, O).
    """
    box = Interval.around(_apply(z.centre, weight, bias), _apply(z.radius, weight.abs(), None))
    if z.ball is None or z.lower.ndim != 2:
        return box
    return box.intersect(_ball_image(z.ball, weight, bias))


def _apply(z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.ndim == 2:
        return F.linear(z, weight, bias)
    out = torch.matmul(weight, z.unsqueeze(-1)).squeeze(-1)
    return out if bias is None else out + bias


def _ball_image(ball: Ball, weight: Tensor, bias: Tensor | None) -> Interval:
    rows = weight * ball.scale
    size = torch.linalg.vector_norm(rows, dim=-1) if ball.norm == "l2" else rows.abs().amax(dim=-1)
    return Interval.around(_apply(ball.centre, weight, bias), ball.eps.unsqueeze(1) * size)


@linear("linear")
def linear_linear(node: Node, rows: Rows, z: Value, weight: Tensor, bias: Tensor | None = None) -> Pulled:
    """Return the rows a W, and the shift a b."""
    fixed = (None,) * (len(node.inputs) - 1)
    if isinstance(rows, OneHot) and len(rows.shape) == 1:
        values = weight[rows.index] * rows.values.unsqueeze(1)
        shift = None if bias is None else bias[rows.index] * rows.values
    else:
        a = rows.dense().values
        values = a @ weight
        shift = None if bias is None else (a @ bias).flatten(1).sum(1) if a.ndim > 2 else a @ bias
    return (Dense(values, rows.owner, tuple(values.shape[1:])), *fixed), shift
