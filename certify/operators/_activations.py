"""What files of activations share: entering one without parameters, and the operand's interval."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.ir import Node
from robustbench_lite.certify.operators.registry import Build, Value, interval, layer, spelled

__all__: list[str] = []


def activation(op: str, function: Callable[[Tensor], Tensor], cls: type[nn.Module] | None, *spellings: Any) -> None:
    """Register a non-decreasing activation without parameters under all its names, with its interval rule."""

    def lower(build: Build, z: Any, inplace: bool = False) -> Node:
        return build.apply(op, z)

    spelled(*spellings, methods=(op, f"{op}_"))(lower)
    if cls is not None:
        layer(cls)(lambda build, module, z: lower(build, z))

    def rule(node: Node, z: Value) -> Interval:
        return varying(z).monotone(function)

    interval(op)(rule)


def varying(z: Value) -> Interval:
    """Return the operand, which must vary: front ends compute an activation of a fixed value themselves."""
    if isinstance(z, Tensor):
        raise TypeError("an activation of a fixed value is no node of its own")
    return z
