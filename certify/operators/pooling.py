"""Averages over windows: they do not decrease when an input grows, so ends map to ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.ir import Node
from robustbench_lite.certify.operators.conv import transposed_conv2d
from robustbench_lite.certify.operators.registry import Build, Pulled, Value, interval, layer, linear, spelled
from robustbench_lite.certify.rows import OneHot, Patch, Rows
from robustbench_lite.certify.transpose import transposed

__all__: list[str] = []

aten = torch.ops.aten


@spelled(F.avg_pool2d, torch._C._nn.avg_pool2d, aten.avg_pool2d.default)
def lower_avg_pool2d(
    build: Build,
    z: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Node:
    """Bring avg_pool2d in."""
    if divisor_override is not None and divisor_override < 0:
        raise build.refuse("avg_pool2d with a negative divisor is not monotone")
    window: dict[str, Any] = {
        "kernel_size": kernel_size,
        "stride": stride or None,
        "padding": padding,
        "ceil_mode": ceil_mode,
    }
    rest: dict[str, Any] = {"count_include_pad": count_include_pad, "divisor_override": divisor_override}
    return build.apply("avg_pool2d", z, **window, **rest)


@layer(nn.AvgPool2d)
def lower_avg_layer(build: Build, module: nn.AvgPool2d, z: Node) -> Node:
    """Bring nn.AvgPool2d in."""
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    return lower_avg_pool2d(build, z, **{name: getattr(module, name) for name in names})


@spelled(F.adaptive_avg_pool2d, aten.adaptive_avg_pool2d.default)
def lower_adaptive(build: Build, z: Any, output_size: Any) -> Node:
    """Bring adaptive_avg_pool2d in."""
    return build.apply("adaptive_avg_pool2d", z, output_size=build.shape[-2:])


@layer(nn.AdaptiveAvgPool2d)
def lower_adaptive_layer(build: Build, module: nn.AdaptiveAvgPool2d, z: Node) -> Node:
    """Bring nn.AdaptiveAvgPool2d in."""
    return lower_adaptive(build, z, module.output_size)


@spelled(torch.mean, aten.mean.dim, methods=("mean",))
def lower_mean(build: Build, z: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Node:
    """Bring the mean over dimensions other than the batch in."""
    dims = (dim,) if isinstance(dim, int) else tuple(dim or ())
    rank = len(z.shape) + 1
    dims = tuple(sorted(d % rank for d in dims))
    if not dims or 0 in dims:
        raise build.refuse("a mean over the batch")
    return build.apply("mean", z, dim=dims, keepdim=keepdim)


def _varying(z: Value) -> Interval:
    if isinstance(z, Tensor):
        raise TypeError("a pooled fixed value is no node of its own")
    return z


@interval("avg_pool2d")
def interval_avg_pool2d(node: Node, z: Value) -> Interval:
    """Return the image of the box."""
    return _varying(z).monotone(lambda t: F.avg_pool2d(t, **node.attributes))


@interval("adaptive_avg_pool2d")
def interval_adaptive(node: Node, z: Value) -> Interval:
    """Return the image of the box."""
    return _varying(z).monotone(lambda t: F.adaptive_avg_pool2d(t, node.attributes["output_size"]))


@interval("mean")
def interval_mean(node: Node, z: Value) -> Interval:
    """Return the image of the box."""
    return _varying(z).monotone(lambda t: t.mean(node.attributes["dim"], node.attributes["keepdim"]))


@linear("avg_pool2d")
def linear_avg_pool2d(node: Node, rows: Rows, z: Interval) -> Pulled:
    """Return the rows spread over their windows."""
    shape = tuple(z.lower.shape[1:])
    if isinstance(rows, (OneHot, Patch)) and _is_convolution(node):
        return (transposed_conv2d(rows, *_as_convolution(node, rows, z.lower)),), None
    return (transposed(lambda t: F.avg_pool2d(t, **node.attributes), rows, shape),), None


@linear("adaptive_avg_pool2d")
def linear_adaptive(node: Node, rows: Rows, z: Interval) -> Pulled:
    """Return the rows spread over their windows."""
    size = node.attributes["output_size"]
    return (transposed(lambda t: F.adaptive_avg_pool2d(t, size), rows, tuple(z.lower.shape[1:])),), None


@linear("mean")
def linear_mean(node: Node, rows: Rows, z: Interval) -> Pulled:
    """Return the rows spread over what was averaged."""
    dim, keepdim = node.attributes["dim"], node.attributes["keepdim"]
    return (transposed(lambda t: t.mean(dim, keepdim), rows, tuple(z.lower.shape[1:])),), None


def _is_convolution(node: Node) -> bool:
    """Say whether every window of an average divides by the same number."""
    fixed = node.attributes
    counts = fixed["count_include_pad"] or _pair(fixed["padding"]) == (0, 0) or fixed["divisor_override"]
    return bool(counts) and not fixed["ceil_mode"]


def _as_convolution(node: Node, rows: Rows, like: Tensor) -> tuple[Tensor, tuple[int, ...], dict[str, Any]]:
    kernel, channels = _pair(node.attributes["kernel_size"]), rows.shape[0]
    share = 1 / (node.attributes["divisor_override"] or kernel[0] * kernel[1])
    window = {"stride": _pair(node.attributes["stride"] or kernel), "padding": _pair(node.attributes["padding"])}
    weight = like.new_full((channels, 1, *kernel), share)
    return weight, tuple(like.shape[1:]), {**window, "dilation": (1, 1), "groups": channels}
