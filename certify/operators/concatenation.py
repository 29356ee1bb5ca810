"""Concatenation along a dimension other than the batch: ends go side by side."""

from __future__ import annotations

from typing import Any

import torch

from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.ir import Node
from robustbench_lite.certify.operators.registry import Build, Value, interval, spelled

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
