"""Monotone activations: the ends of an interval map to the ends of its image, exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.ir import Node
from robustbench_lite.certify.operators.registry import Build, Value, interval, layer, spelled

__all__: list[str] = []

aten = torch.ops.aten


def _activation(op: str, function: Callable[[Tensor], Tensor], cls: type[nn.Module] | None, *spellings: Any) -> None:
    """Register an activation without parameters under all its names."""

    def lower(build: Build, z: Any, inplace: bool = False) -> Node:
        return build.apply(op, z)

    spelled(*spellings, methods=(op, f"{op}_"))(lower)
    if cls is not None:
        layer(cls)(lambda build, module, z: lower(build, z))

    def rule(node: Node, z: Value) -> Interval:
        return _varying(z).monotone(function)

    interval(op)(rule)


def _varying(z: Value) -> Interval:
    if isinstance(z, Tensor):
        raise TypeError("an activation of a fixed value is no node of its own")
    return z


_activation(
    "relu", torch.relu, nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, aten.relu.default, aten.relu_.default
)
_activation("tanh", torch.tanh, nn.Tanh, torch.tanh, F.tanh, torch.tanh_, aten.tanh.default, aten.tanh_.default)
_activation(
    "sigmoid",
    torch.sigmoid,
    nn.Sigmoid,
    torch.sigmoid,
    F.sigmoid,
    torch.sigmoid_,
    aten.sigmoid.default,
    torch.special.expit,
)
_activation("arctan", torch.atan, None, torch.atan, torch.arctan, aten.atan.default, aten.arctan.default)
spelled(methods=("atan", "atan_"))(lambda build, z: build.apply("arctan", z))


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
    return _varying(z).monotone(lambda t: F.leaky_relu(t, node.attributes["negative_slope"]))


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
    return _varying(z).monotone(lambda t: F.elu(t, node.attributes["alpha"]))
