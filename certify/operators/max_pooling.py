"""Maximum over windows.

Below the maximum of a window lies each of its entries: rows take the one whose lower bound m is the largest. Above it
lies m + sum over i of relu(z_i - m), and above that, entry by entry, the chord of the relu,
of slope (u_i - m)+ / (u_i - l_i).
Where a single entry can be the largest, both are that entry. Where the constant max(u) lies below the second plane at
the middle of the box, it is taken instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.ir import Node
from robustbench_lite.certify.operators.registry import Build, Pulled, Value, interval, layer, linear, spelled
from robustbench_lite.certify.rows import Dense, Rows

__all__: list[str] = []


@spelled(F.max_pool2d, torch.max_pool2d, torch.ops.aten.max_pool2d.default)
def lower_max_pool2d(
    build: Build,
    z: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Node:
    """Bring max_pool2d in."""
    if return_indices:
        raise build.refuse("max_pool2d with return_indices")
    window = {"kernel_size": kernel_size, "stride": stride or None, "padding": padding, "dilation": dilation}
    return build.apply("max_pool2d", z, **window, ceil_mode=ceil_mode)


@layer(nn.MaxPool2d)
def lower_max_layer(build: Build, module: nn.MaxPool2d, z: Node) -> Node:
    """Bring nn.MaxPool2d in."""
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    return lower_max_pool2d(build, z, **{name: getattr(module, name) for name in names})


@interval("max_pool2d")
def interval_max_pool2d(node: Node, z: Value) -> Interval:
    """Return the image of the box: maxima do not fall when an entry rises."""
    if isinstance(z, Tensor):
        raise TypeError("a pooled fixed value is no node of its own")
    return z.monotone(lambda t: F.max_pool2d(t, **node.attributes))


@dataclass(frozen=True, eq=False)
class _Planes:
    """The planes around the maximum of each window: weights (B, C, taps, windows), shifts (B, C, windows)."""

    lower: Tensor
    upper: Tensor
    shift: Tensor
    undecided: Tensor  # (B, C, windows): more than one entry can be the largest


def _wanted(node: Node, z: Interval) -> Tensor:
    """Say which entries can be the largest of a window that is not decided."""
    planes = _planes(node, z)
    taps = ((planes.upper > 0) | (planes.lower > 0)) & planes.undecided.unsqueeze(2)
    return _folded(node, taps.to(z.lower.dtype), tuple(z.lower.shape[1:])) > 0


@linear("max_pool2d", wanted=_wanted)
def linear_max_pool2d(node: Node, rows: Rows, z: Interval) -> Pulled:
    """Return the rows over the planes: the lower where a coefficient is positive, else the upper."""
    dense, planes = rows.dense(), _planes(node, z)
    a = dense.values.flatten(2)
    lower, upper = dense.owned(planes.lower), dense.owned(planes.upper)
    spread = a.clamp_min(0).unsqueeze(2) * lower + a.clamp_max(0).unsqueeze(2) * upper
    shift = (a.clamp_max(0) * dense.owned(planes.shift)).flatten(1).sum(1)
    shape = tuple(z.lower.shape[1:])
    return (Dense(_folded(node, spread, shape), rows.owner, shape),), shift


def _planes(node: Node, z: Interval) -> _Planes:
    lower, upper = (_windows(node, t) for t in (z.lower, z.upper))
    best, place = lower.max(dim=2)
    one = F.one_hot(place, lower.shape[2]).movedim(-1, 2).to(lower.dtype)
    m, highest = best.unsqueeze(2), upper.amax(2)
    excess = (upper - m).clamp_min(0)
    width = torch.where(excess > 0, upper - lower, 1)
    slope = excess / width
    shift = best - (slope * torch.where(excess > 0, lower, 0)).sum(2)
    middle = torch.where(excess > 0, (upper + lower) / 2, 0)
    flat = (slope * middle).sum(2) + shift > highest
    slope, shift = torch.where(flat.unsqueeze(2), 0, slope), torch.where(flat, highest, shift)
    rivals = torch.where(one.bool(), -torch.inf, upper).amax(2)
    decided = rivals <= best
    slope, shift = torch.where(decided.unsqueeze(2), one, slope), torch.where(decided, 0, shift)
    return _Planes(one, slope, shift, ~decided)


def _windows(node: Node, t: Tensor) -> Tensor:
    """Return the entries of each window, (B, C, taps, windows): -inf on the padding."""
    _, sides, cut = _geometry(node, tuple(t.shape[1:]))
    maps = F.pad(t, sides, value=-torch.inf).flatten(0, 1).unsqueeze(1)
    taps = F.unfold(maps, **cut)
    return taps.reshape(len(t), t.shape[1], -1, taps.shape[-1])


def _folded(node: Node, taps: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the sums (N, *shape) of what each entry got from its windows: the transpose of `_windows`."""
    reach, sides, cut = _geometry(node, shape)
    maps = F.fold(taps.flatten(0, 1), tuple(reach), **cut).reshape(len(taps), shape[0], *reach)
    return F.pad(maps, [-side for side in sides])


def _geometry(node: Node, shape: tuple[int, ...]) -> tuple[list[int], list[int], dict[str, Any]]:
    """Return (size, padding, cut) of maps that the windows fill just so: padding may be negative at the far sides."""
    kernel, padding, dilation = (_pair(node.attributes[name]) for name in ("kernel_size", "padding", "dilation"))
    stride = _pair(node.attributes["stride"] or kernel)
    reach = [
        (count - 1) * s + d * (k - 1) + 1
        for count, s, d, k in zip(node.shape[1:], stride, dilation, kernel, strict=True)
    ]
    down, across = ((p, full - size - p) for p, full, size in zip(padding, reach, shape[1:], strict=True))
    return reach, [*across, *down], {"kernel_size": kernel, "stride": stride, "dilation": dilation}
