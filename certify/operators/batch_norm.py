"""BatchNorm in eval mode: z -> a z + s for each channel, a = w / sqrt(var + eps), s = b - a mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.ir import Node
from robustbench_lite.certify.operators.elementwise import scaled
from robustbench_lite.certify.operators.registry import Build, Pulled, Value, interval, layer, linear, spelled
from robustbench_lite.certify.rows import Rows

__all__ = ["factor_and_shift"]

aten = torch.ops.aten
NO_STATISTICS = "BatchNorm without running statistics mixes the samples of a batch; use track_running_stats=True"


@spelled(F.batch_norm)
def lower_functional(
    build: Build,
    z: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Node:
    """Bring F.batch_norm in."""
    if training or running_mean is None or running_var is None:
        raise build.refuse(NO_STATISTICS)
    present = (weight is not None, bias is not None)
    return build.apply("batch_norm", z, running_mean, running_var, weight, bias, eps=eps, present=present)


@spelled(aten.batch_norm.default)
def lower_aten(
    build: Build,
    z: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = False,
) -> Node:
    """Bring ATen's batch_norm in: its operands come in another order."""
    return lower_functional(build, z, running_mean, running_var, weight, bias, training, momentum, eps)


@layer(nn.BatchNorm1d, nn.BatchNorm2d)
def lower_layer(build: Build, module: nn.BatchNorm2d, z: Node) -> Node:
    """Bring nn.BatchNorm1d and nn.BatchNorm2d in."""
    statistics = build.parameter("running_mean"), build.parameter("running_var")
    weights = build.parameter("weight"), build.parameter("bias")
    return lower_functional(build, z, *statistics, *weights, eps=module.eps)


def factor_and_shift(node: Node, mean: Tensor, variance: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return a and s, shaped to broadcast over (B, C, ...)."""
    given = iter(weights)
    weight, bias = (next(given) if there else None for there in node.attributes["present"])
    factor = (variance + node.attributes["eps"]).rsqrt()
    factor = factor if weight is None else factor * weight
    shift = -mean * factor if bias is None else bias - mean * factor
    shape = (1, -1, *[1] * (len(node.shape) - 1))
    return factor.reshape(shape), shift.reshape(shape)


@interval("batch_norm")
def interval_batch_norm(node: Node, z: Value, mean: Value, variance: Value, *weights: Value) -> Interval:
    """Return the box around a z + s."""
    fixed = [value for value in (mean, variance, *weights) if isinstance(value, Tensor)]
    if not isinstance(z, Interval) or len(fixed) != 2 + len(weights):
        raise TypeError("only the input of BatchNorm may vary, not its statistics")
    return scaled(z, *factor_and_shift(node, *fixed))


@linear("batch_norm")
def linear_batch_norm(node: Node, rows: Rows, z: Value, *statistics: Tensor) -> Pulled:
    """Return the rows a times the factor, and a times the shift."""
    factor, shift = factor_and_shift(node, *statistics)
    return (rows.scaled(factor), *[None] * len(statistics)), rows.dot(shift)
