"""A network over a threat as a mixed-integer programme: the input set's variables, then each operator in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn

from robustbench_lite.certify._affine import Affine, matrices
from robustbench_lite.certify._milp import Programme
from robustbench_lite.certify.encodings import ENCODINGS
from robustbench_lite.certify.errors import UnsupportedOperator
from robustbench_lite.certify.graph import graph_of, uncompiled
from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.ir import Graph, Node
from robustbench_lite.certify.precision import full_precision
from robustbench_lite.core.threats import TOLERANCE, Lp

__all__: list[str] = []

Floats: TypeAlias = NDArray[np.float64]
Bounder: TypeAlias = Callable[[Programme, int, Affine], tuple[Floats, Floats]]

AFFINE = frozenset({
    "adaptive_avg_pool2d", "add", "avg_pool2d", "batch_norm", "cat", "conv2d", "div", "index", "linear", "mean", "mul",
    "pad", "permute", "reshape", "sub",
})  # fmt: skip
NORMS = ("linf", "l1", "l0")


@dataclass(frozen=True, eq=False)
class Step:
    """One operator with its numbers: an affine map of its inputs, or an entry of `ENCODINGS`.

    Attributes:
        node: of the graph.
        inputs: positions of the operands that vary.
        matrices: one for each of them.
        offset: of an affine map.
    """

    node: Node
    inputs: tuple[int, ...]
    matrices: tuple[Any, ...]
    offset: Floats


@dataclass(frozen=True, eq=False)
class Network:
    """The operators that the logits depend on, in order; the same for all images."""

    steps: tuple[Step, ...]
    output: int
    num_classes: int

    def encode(self, programme: Programme, image: Affine, bounds: Bounder) -> Affine:
        """Add the network to a programme and return its logits.

        Args:
            programme: holds the image's variables; gets those of the network.
            image: the flat input.
            bounds: called with the programme so far, a node's position and its value, where that enters an operator
                that is not affine; returns bounds (lower, upper) of it.
        """
        values = {0: image}
        for step in self.steps:
            operands = [values[i] for i in step.inputs]
            if step.node.op in AFFINE:
                parts = [value.mapped(matrix) for value, matrix in zip(operands, step.matrices, strict=True)]
                values[step.node.index] = sum(parts[1:], parts[0]).shifted(step.offset)
            else:
                (operand,) = operands
                lower, upper = bounds(programme, step.inputs[0], operand)
                rule = ENCODINGS[step.node.op]
                values[step.node.index] = rule(programme, step.node, operand, lower, upper, *step.matrices)
        return values[self.output]


def network_of(model: nn.Module, x: Tensor) -> Network:
    """Return the operators of a model, read now, in float64.

    Raises:
        UnsupportedOperator: one is neither affine nor in `ENCODINGS`.
    """
    graph = graph_of(model, x)
    model = uncompiled(model)
    like = torch.zeros((), dtype=torch.float64)
    needed = _needed(graph)
    constants: dict[int, Tensor] = {}
    steps: list[Step] = []
    with torch.no_grad(), full_precision(like.device):
        for node in graph.nodes:
            if node.index not in needed or node.op == "input":
                continue
            if not node.varies:
                operands = [constants[i] for i in node.inputs]
                constants[node.index] = graph.constant(node, operands, model, like)
                continue
            steps.append(_step(graph, node, constants))
    return Network(tuple(steps), graph.output, graph.num_classes)


def _step(graph: Graph, node: Node, constants: Mapping[int, Tensor]) -> Step:
    if node.op not in AFFINE and node.op not in ENCODINGS:
        raise UnsupportedOperator(
            f"{node.source}: {node.op} has no exact encoding; exact programmes are made of affine operators and of "
            f"{', '.join(sorted(ENCODINGS))}; IBP and linear bounds know more operators"
        )
    inputs = tuple(i for i in node.inputs if i not in constants)
    shapes = [graph.nodes[i].shape for i in inputs]
    if node.op in ("relu", "leaky_relu"):
        return Step(node, inputs, (None,), np.zeros(math.prod(node.shape)))
    found, offset = matrices(node, [constants.get(i) for i in node.inputs], shapes)
    return Step(node, inputs, tuple(found), offset)


def _needed(graph: Graph) -> set[int]:
    needed = {graph.output}
    for node in reversed(graph.nodes):
        if node.index in needed:
            needed.update(node.inputs)
    return needed


def enter(programme: Programme, x: Tensor, threat: Lp) -> Affine:
    """Add the images of a threat around one image `x` (1, C, H, W) to an empty programme; return the flat image.

    linf is a box. l1 splits the change into its parts upward and downward, whose sum is at most eps. l0 has a binary
    for each pixel, or each coordinate, that may change; at most floor(eps) of them are 1.
    """
    x = x.clamp(*threat.bounds)
    lower, upper = (side.flatten().numpy() for side in threat.box(x))
    eps, centre = float(threat.radius(x)), x.flatten().numpy()
    if threat.norm == "linf":
        return programme.variables(lower, upper)
    if threat.norm == "l1":
        up = programme.variables(np.zeros_like(centre), np.minimum(upper - centre, eps))
        down = programme.variables(np.zeros_like(centre), np.minimum(centre - lower, eps))
        total = sparse.csr_array(np.ones((1, len(centre))))
        programme.require((up + down).mapped(total).shifted(np.array([-eps])))
        return (up - down).shifted(centre)
    return _moved_pixels(programme, x, threat, math.floor(eps + TOLERANCE * max(eps, 1.0)))


def _moved_pixels(programme: Programme, x: Tensor, threat: Lp, most: int) -> Affine:
    centre = x.flatten().numpy()
    if most < 1:
        return programme.variables(centre, centre)
    lower, upper = (np.full_like(centre, bound) for bound in threat.bounds)
    image = programme.variables(lower, upper)
    pixels = x[0, 0].numel() if threat.per == "pixel" else len(centre)
    moved = programme.variables(np.zeros(pixels), np.ones(pixels), integral=True)
    each = moved.rows(np.arange(len(centre)) % pixels)
    programme.require(image.shifted(-centre) - each.scaled(upper - centre))
    programme.require((each.scaled(lower - centre) - image).shifted(centre))
    total = sparse.csr_array(np.ones((1, pixels)))
    programme.require(moved.mapped(total).shifted(np.array([-float(most)])))
    return image


def given(intermediate: Mapping[int, Interval], row: int) -> Bounder:
    """Return a `Bounder` that takes the given bounds of one sample, and the programme's own where there are none."""

    def bounds(programme: Programme, index: int, value: Affine) -> tuple[Floats, Floats]:
        if index not in intermediate:
            return programme.range(value)
        sides = intermediate[index].lower, intermediate[index].upper
        lower, upper = (side[row].detach().double().cpu().flatten().numpy() for side in sides)
        if len(lower) != len(value.offset):
            raise ValueError(f"bounds of node {index} must have {len(value.offset)} entries a sample, got {len(lower)}")
        return lower, upper

    return bounds


def cut(intermediate: Mapping[int, Interval], row: int) -> Bounder:
    """Return a `Bounder` that cuts the programme's own bounds with the given ones of one sample."""
    known = given(intermediate, row)

    def bounds(programme: Programme, index: int, value: Affine) -> tuple[Floats, Floats]:
        (lower, upper), (least, most) = programme.range(value), known(programme, index, value)
        lower = np.maximum(lower, least)
        return lower, np.maximum(np.minimum(upper, most), lower)

    return bounds


def tightened(first: Bounder, remaining: Callable[[], float]) -> Bounder:
    """Return a `Bounder` that minimises and maximises each entry of unknown sign by a linear programme.

    Args:
        first: whose bounds are tightened.
        remaining: seconds that are left; where there are none, the bounds stay as they are.
    """

    def bounds(programme: Programme, index: int, value: Affine) -> tuple[Floats, Floats]:
        lower, upper = first(programme, index, value)
        if programme.is_box:
            return lower, upper
        for i in np.flatnonzero((lower < 0) & (upper > 0)):
            entry = value.rows(np.array([i]))
            lower[i] = max(lower[i], programme.minimise(entry, relaxed=True, seconds=remaining()).lower)
            if lower[i] < 0:
                negative = entry.scaled(np.array([-1.0]))
                upper[i] = min(upper[i], -programme.minimise(negative, relaxed=True, seconds=remaining()).lower)
                upper[i] = max(upper[i], lower[i])
        return lower, upper

    return bounds
