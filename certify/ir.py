"""The intermediate representation that both front ends lower to and that every bound walks.

A graph is a list of nodes in the order of evaluation. It knows names of parameters, not their values: these are read
from the model at every evaluation, so that bounds follow training. Shapes leave out the batch: a graph serves any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Graph", "Node", "Source"]


@dataclass(frozen=True)
class Source:
    """Where a node comes from: its name in the trace, the path and class of its module, a line of code if known."""

    name: str
    module: str = ""
    line: str = ""

    def __str__(self) -> str:
        """Read like "node 'gelu' (module 'blocks.1 (Block)', net.py:12)"."""
        return f"node {self.name!r} (module {self.module or 'the model itself'}{', ' + self.line if self.line else ''})"


@dataclass(frozen=True, eq=False)
class Node:
    """One operation.

    Attributes:
        index: position in the graph.
        op: "input", "parameter", "literal", "compute" (a function of parameters and literals alone), or the name of
            an operator of `certify.operators`.
        inputs: positions of the operands.
        attributes: static arguments.
        shape: without the batch where the node varies with the input; whole otherwise.
        varies: whether the value depends on the input.
        source: for error messages.
    """

    index: int
    op: str
    inputs: tuple[int, ...]
    attributes: Mapping[str, Any]
    shape: tuple[int, ...]
    varies: bool
    source: Source


@dataclass(frozen=True, eq=False)
class Graph:
    """A model's forward in eval mode, as nodes in order.

    Attributes:
        nodes: in the order of evaluation; the first is the input.
        output: position of the logits.
        constants: tensors that the trace made itself, by name.
        checked: whether it was seen to compute what the model computes; not where that gave no finite logits.
    """

    nodes: tuple[Node, ...]
    output: int
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    checked: bool = False

    @property
    def num_classes(self) -> int:
        """The number K of logits."""
        return self.nodes[self.output].shape[-1]

    @cached_property
    def last_use(self) -> tuple[int, ...]:
        """For each node, the last position that reads it: its value can be dropped afterwards."""
        last = list(range(len(self.nodes)))
        for node in self.nodes:
            for operand in node.inputs:
                last[operand] = node.index
        last[self.output] = len(self.nodes)
        return tuple(last)

    def constant(self, node: Node, operands: list[Any], model: nn.Module, like: Tensor) -> Tensor:
        """Return the present value of a node that does not vary with the input, in the dtype and device of `like`."""
        value: Tensor
        if node.op == "parameter":
            name = node.attributes["name"]
            value = self.constants[name] if name in self.constants else attrgetter(name)(model)
        elif node.op == "literal":
            return torch.tensor(node.attributes["value"], dtype=like.dtype, device=like.device)
        else:
            value = node.attributes["call"](*operands)
        dtype = like.dtype if value.is_floating_point() else value.dtype
        return value if value.dtype == dtype and value.device == like.device else value.to(like.device, dtype)
