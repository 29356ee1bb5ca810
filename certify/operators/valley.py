"""GELU and SiLU: they fall to one minimum and rise after it.

The image of [l, u] ends above at the larger end value; below at the minimum where the interval holds it, else at the
smaller end value. The minima are computed to more digits than float64 has and rounded down.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.ir import Node
from robustbench_lite.certify.operators.registry import Build, Value, interval, layer, spelled

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


def _image(z: Value, name: str, function: Any) -> Interval:
    if isinstance(z, Tensor):
        raise TypeError(f"{name} of a fixed value is no node of its own")
    bottom, value = MINIMA[name]
    at_lower, at_upper = function(z.lower), function(z.upper)
    held = (z.lower <= bottom) & (z.upper >= bottom)
    lower = torch.where(held, value, torch.minimum(at_lower, at_upper))
    return Interval(lower, torch.maximum(at_lower, at_upper))
