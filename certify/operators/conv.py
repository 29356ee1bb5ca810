"""Conv2d: an affine map that shares its weights. Centre conv(c, W) + b, radius conv(r, |W|).

At the input's Lp ball the dual norm of each output position's row is again a convolution: for l2 the root of
conv(scale^2, W^2), zero padding included; for l1 the largest weight among the taps that fall on the image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

from robustbench_lite.certify.intervals import Ball, Interval
from robustbench_lite.certify.ir import Node
from robustbench_lite.certify.operators.registry import Build, Pulled, Value, interval, layer, linear, spelled
from robustbench_lite.certify.rows import Dense, OneHot, Patch, Rows

__all__: list[str] = []

aten = torch.ops.aten
_grad: Any = import_module("torch.nn.grad")  # untyped
_Pair = tuple[int, int]
FEW_OUTPUTS = 2**13  # entries up to which one product of matrices is 2 to 3 times faster than two convolutions
FEW_CHANNELS = 4  # to so few a product of matrices is 3 to 6 times faster in float32; to 16 half as fast


@spelled(F.conv2d, torch.conv2d, aten.conv2d.default, aten.conv2d.padding)
def lower_conv2d(
    build: Build,
    z: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Node:
    """Bring F.conv2d in; "same" and "valid" padding become numbers, an uneven "same" a padding of its own."""
    dilation = _pair(dilation)
    if padding == "same":
        z, padding = _same(build, z, weight.shape[-2:], dilation)
    elif padding == "valid":
        padding = 0
    fixed = {"stride": _pair(stride), "padding": _pair(padding), "dilation": dilation, "groups": groups}
    return build.apply("conv2d", z, weight, bias, **fixed)


def _same(build: Build, z: Node, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[Node, Any]:
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if all(t % 2 == 0 for t in total):
        return z, tuple(t // 2 for t in total)
    left = [t // 2 for t in total]
    sides = (left[1], total[1] - left[1], left[0], total[0] - left[0])  # last dimension first
    return _padded(build, z, sides, "constant"), (0, 0)


def _padded(build: Build, z: Node, sides: tuple[int, ...], mode: str) -> Node:
    height, width = z.shape[-2:]
    shape = (*z.shape[:-2], height + sides[2] + sides[3], width + sides[0] + sides[1])
    return build.apply("pad", z, sides=sides, mode=mode, value=0.0, shape=shape)


@spelled(aten.convolution.default)
def lower_convolution(
    build: Build,
    z: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Node:
    """Bring ATen's general convolution in, where it is a plain one over images."""
    if transposed or len(weight.shape) != 4:
        raise build.refuse("only two-dimensional convolutions that are not transposed are supported")
    return lower_conv2d(build, z, weight, bias, stride, padding, dilation, groups)


@layer(nn.Conv2d)
def lower_layer(build: Build, module: nn.Conv2d, z: Node) -> Node:
    """Bring nn.Conv2d in; padding other than with zeros becomes a node of its own."""
    weight, bias = build.parameter("weight"), build.parameter("bias")
    padding: Any = module.padding
    if module.padding_mode != "zeros":
        z = _padded(build, z, tuple(module._reversed_padding_repeated_twice), module.padding_mode)
        padding = 0
    return lower_conv2d(build, z, weight, bias, module.stride, padding, module.dilation, module.groups)


@interval("conv2d")
def interval_conv2d(node: Node, z: Value, weight: Value, bias: Value | None = None) -> Interval:
    """Return the box around conv(z, W) + b."""
    if not isinstance(z, Interval) or not isinstance(weight, Tensor) or isinstance(bias, Interval):
        raise TypeError("only the input of a convolution may vary, not its weights")
    fixed = node.attributes
    box = Interval.around(*_both(node, z, weight, bias))
    if z.ball is None:
        return box
    size = _l2_gain(z.ball, weight, node) if z.ball.norm == "l2" else _l1_gain(z.ball, weight, node)
    radius = z.ball.eps.reshape(-1, 1, 1, 1) * size
    return box.intersect(Interval.around(F.conv2d(z.ball.centre, weight, bias, **fixed), radius))


def _both(node: Node, z: Interval, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return conv(centre, W) + b and conv(radius, |W|)."""
    fixed, count = node.attributes, len(z.lower)
    if z.lower.device.type != "cpu" or fixed["groups"] > 1 or count * math.prod(node.shape) > FEW_OUTPUTS:
        return F.conv2d(z.centre, weight, bias, **fixed), F.conv2d(z.radius, weight.abs(), None, **fixed)
    window = {name: fixed[name] for name in ("stride", "padding", "dilation")}
    taps = F.unfold(torch.cat([z.centre, z.radius]), weight.shape[-2:], **window)
    rows = weight.flatten(1).expand(count, -1, -1)
    centre, radius = rows @ taps[:count], rows.abs() @ taps[count:]
    centre = centre if bias is None else centre + bias.unsqueeze(1)
    return centre.reshape(count, *node.shape), radius.reshape(count, *node.shape)


def _l2_gain(ball: Ball, weight: Tensor, node: Node) -> Tensor:
    return F.conv2d(ball.scale**2, weight**2, None, **node.attributes).sqrt()


def _l1_gain(ball: Ball, weight: Tensor, node: Node) -> Tensor:
    """Return the largest |weight * scale| over the taps of each output position, (1, O, H', W')."""
    groups = node.attributes["groups"]
    window = {name: node.attributes[name] for name in ("stride", "padding", "dilation")}
    taps = F.unfold(ball.scale.abs(), weight.shape[-2:], **window)  # (1, I * kh * kw, positions), 0 on the padding
    blocks = taps.reshape(groups, -1, taps.shape[-1])
    rows = weight.abs().reshape(groups, len(weight) // groups, -1, 1)
    # One output channel at a time: all at once would hold outputs x taps x positions numbers.
    gains = [(row * block).amax(dim=0) for block, own in zip(blocks, rows, strict=True) for row in own]
    return torch.stack(gains).reshape(1, len(weight), *node.shape[1:])


@linear("conv2d")
def linear_conv2d(node: Node, rows: Rows, z: Interval, weight: Tensor, bias: Tensor | None = None) -> Pulled:
    """Return the transposed convolution of the rows, and the shift a b."""
    fixed = (None,) * (len(node.inputs) - 1)
    shift = None if bias is None else rows.dot(bias.reshape(1, -1, 1, 1))
    return (transposed_conv2d(rows, weight, tuple(z.lower.shape[1:]), node.attributes), *fixed), shift


def transposed_conv2d(rows: Rows, weight: Tensor, shape: tuple[int, ...], fixed: Mapping[str, Any]) -> Rows:
    """Return rows over the value of a convolution as rows over its input.

    Args:
        rows: over the output (O, H', W').
        weight: (O, I / groups, h, w).
        shape: of the input, (I, H, W).
        fixed: stride, padding and dilation, pairs, and groups.
    """
    if isinstance(rows, OneHot) and fixed["groups"] == 1:
        return _kernels(rows, weight, shape, fixed)
    if isinstance(rows, OneHot):
        rows = rows.patch()
    stride, padding, dilation, groups = (fixed[name] for name in ("stride", "padding", "dilation", "groups"))
    if isinstance(rows, Patch):
        values = _spread(rows.values, weight, stride, dilation, groups)
        return _moved(rows, values, shape, fixed).trimmed()
    values = _spread(rows.dense().values, weight, stride, dilation, groups)  # over the padded input
    top, left = padding
    below, beyond = shape[1] + top - values.shape[2], shape[2] + left - values.shape[3]
    return Dense(F.pad(values, (-left, beyond, -top, below)), rows.owner, shape)


def _spread(a: Tensor, weight: Tensor, stride: _Pair, dilation: _Pair, groups: int) -> Tensor:
    """Return the transposed convolution of `a`, (N, O, h, w), by what is fastest: they differ up to sixfold."""
    if a.device.type != "cpu":
        return F.conv_transpose2d(a, weight, None, stride, 0, 0, groups, dilation)
    height, width = (
        (n - 1) * s + d * (k - 1) + 1
        for n, s, d, k in zip(a.shape[2:], stride, dilation, weight.shape[2:], strict=True)
    )
    few = groups == 1 and weight.shape[1] <= FEW_CHANNELS
    if a.dtype == torch.float64 and (few or stride == (1, 1)):
        size = (len(a), weight.shape[1] * groups, height, width)
        values: Tensor = _grad.conv2d_input(size, weight, a, stride, 0, dilation, groups)
        return values
    if few:
        columns = torch.matmul(weight.flatten(1).t(), a.flatten(2))
        return F.fold(columns, (height, width), weight.shape[2:], dilation, 0, stride)
    last = torch.channels_last
    a, weight = a.contiguous(memory_format=last), weight.contiguous(memory_format=last)
    return F.conv_transpose2d(a, weight, None, stride, 0, 0, groups, dilation)


def _kernels(rows: OneHot, weight: Tensor, shape: tuple[int, ...], fixed: Mapping[str, Any]) -> Rows:
    """Return the kernels of single neurons: no transposed convolution is needed."""
    channel = rows.index // (rows.shape[1] * rows.shape[2])
    kernels = weight.index_select(0, channel) * rows.values.reshape(-1, 1, 1, 1)
    if fixed["dilation"] != (1, 1):
        kernels = _dilated(kernels, fixed["dilation"])
    return _moved(rows.patch(), kernels, shape, fixed).trimmed()


def _dilated(kernels: Tensor, dilation: tuple[int, int]) -> Tensor:
    height, width = ((size - 1) * d + 1 for size, d in zip(kernels.shape[-2:], dilation, strict=True))
    spread = kernels.new_zeros(*kernels.shape[:2], height, width)
    spread[:, :, :: dilation[0], :: dilation[1]] = kernels
    return spread


def _moved(rows: Patch, values: Tensor, shape: tuple[int, ...], fixed: Mapping[str, Any]) -> Patch:
    """Return windows on the input of a convolution that stand below windows on its output."""
    (sy, sx), (py, px) = fixed["stride"], fixed["padding"]
    stride = rows.stride[0] * sy, rows.stride[1] * sx
    offset = rows.offset[0] * sy - py, rows.offset[1] * sx - px
    return Patch(values, rows.owner, shape, rows.place, stride, offset)
