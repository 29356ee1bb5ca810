"""Softplus: log(1 + exp(beta z)) / beta, replaced by z itself above threshold / beta.

Each piece is monotone, and at the threshold torch's function falls by log(1 + exp(-threshold)) / beta: 2e-9 with the
defaults, 0.3 with a threshold of 1. An interval that holds the threshold counts both one-sided limits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.ir import Node
from robustbench_lite.certify.operators.registry import Build, Value, interval, layer, spelled

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
    image = z.monotone(lambda t: F.softplus(t, beta, threshold))
    edge = threshold / beta
    before = edge + math.log1p(math.exp(-threshold)) / beta if threshold > -700 else 0.0  # limit from below
    held = (z.lower <= edge) & (z.upper >= edge)
    lower = torch.where(held, image.lower.clamp_max(edge), image.lower)
    upper = torch.where(held, image.upper.clamp_min(before), image.upper)
    return Interval(lower, upper)
