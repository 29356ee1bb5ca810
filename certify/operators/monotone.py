"""Monotone activations: the ends of an interval map to the ends of its image, exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.ir import Node
from robustbench_lite.certify.operators._activations import activation, varying
from robustbench_lite.certify.operators.registry import Build, Value, interval, layer, spelled

__all__: list[str] = []

aten = torch.ops.aten

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
spelled(methods=("atan", "atan_"))(lambda build, z: build.apply("arctan", z))


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
