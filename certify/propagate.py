"""Interval bounds of a whole graph: each node's rule in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.ir import Graph, Node
from robustbench_lite.certify.operators import registry
from robustbench_lite.certify.operators.linear import affine_image
from robustbench_lite.certify.operators.registry import Value

__all__: list[str] = []


def propagate(
    graph: Graph,
    model: nn.Module,
    box: Interval,
    C: Tensor | None = None,
    keep: Callable[[Node, Value], Value] | None = None,
) -> Interval:
    """Return the box around C z(x), or around the logits z(x) where C is None, for all x in `box`.

    A last Linear layer is merged with C before it is bounded ("elided"): what two logits share cancels.

    Args:
        graph: of the model.
        model: its parameters are read now.
        box: of images (B, C, H, W).
        C: specification (S, K) or (B, S, K).
        keep: called with each node and its value, whose answer takes the value's place: a way to see and tighten them.
    """
    values: list[Any] = [None] * len(graph.nodes)
    last = graph.nodes[graph.output]
    elide = C is not None and last.op == "linear" and last.inputs[0] != graph.output
    for node in graph.nodes[: graph.output + 1]:
        if graph.last_use[node.index] == node.index:
            continue  # nothing reads it
        operands = [values[i] for i in node.inputs]
        if elide and node is last and C is not None:
            return _elided(C, *operands)
        value = _value(graph, node, operands, model, box)
        values[node.index] = value if keep is None else keep(node, value)
        for i in node.inputs:
            if graph.last_use[i] == node.index:
                values[i] = None
    logits: Interval = values[graph.output]
    return logits if C is None else affine_image(logits, C, None)


def _value(graph: Graph, node: Node, operands: list[Any], model: nn.Module, box: Interval) -> Value:
    if node.op == "input":
        return box
    if not node.varies:
        return graph.constant(node, operands, model, box.lower)
    return registry.INTERVAL[node.op](node, *operands)


def _elided(C: Tensor, z: Interval, weight: Tensor, bias: Tensor | None = None) -> Interval:
    return affine_image(z, C @ weight, None if bias is None else C @ bias)
