"""Concatenation along a dimension other than the batch: ends go side by side."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.ir import Node
from robustbench_lite.certify.operators.registry import Build, Pulled, Value, interval, linear, spelled
from robustbench_lite.certify.rows import OneHot, Patch, Rows

__all__: list[str] = []


@spelled(torch.cat, torch.concat, torch.concatenate, torch.ops.aten.cat.default)
def lower_cat(build: Build, tensors: Any, dim: int = 0) -> Node:
    """Bring torch.cat in."""
    dim = dim % (len(build.shape) + 1)
    if dim == 0:
        raise build.refuse("a concatenation along the batch")
    if not all(isinstance(part, Node) and part.varies for part in tensors):
        raise build.refuse("a concatenation with a part that does not depend on the input; pad with F.pad")
    return build.apply("cat", *tensors, dim=dim)


@interval("cat")
def interval_cat(node: Node, *parts: Value) -> Interval:
    """Return the joined box."""
    boxes = [part for part in parts if isinstance(part, Interval)]
    dim = node.attributes["dim"]
    return Interval(torch.cat([box.lower for box in boxes], dim), torch.cat([box.upper for box in boxes], dim))


@linear("cat")
def linear_cat(node: Node, rows: Rows, *parts: Interval) -> Pulled:
    """Return each part's share of the rows."""
    dim = node.attributes["dim"]
    if isinstance(rows, OneHot) and len(rows.shape) == 3 and dim == 1:
        rows = rows.patch()
    rows = rows if isinstance(rows, Patch) and dim == 1 else rows.dense()
    shares = torch.split(rows.values, [part.lower.shape[dim] for part in parts], dim)
    return tuple(_share(rows, values, part) for values, part in zip(shares, parts, strict=True)), None


def _share(rows: Rows, values: Tensor, part: Interval) -> Rows:
    return replace(rows, values=values, shape=tuple(part.lower.shape[1:]))
