"""Linear bounds: rows of coefficients walk backwards from a node to the input, and are minimised over the input set.

On the way an affine operator hands a row over to its operands exactly; an activation is replaced by the line below it
where the coefficient is positive and by the line above it where it is negative. What reaches the input is a linear
function below the row, everywhere on the set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from robustbench_lite.certify.errors import UnsupportedOperator
from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.ir import Graph, Node
from robustbench_lite.certify.lines import Lines
from robustbench_lite.certify.operators.registry import LINEAR, LINES, WANTED, Value
from robustbench_lite.certify.propagate import propagate
from robustbench_lite.certify.region import Region
from robustbench_lite.certify.rows import Dense, OneHot, Rows

__all__ = ["LinearBounds"]

Side: TypeAlias = tuple[int, int]

CPU_BUDGET, GPU_BUDGET = 2**26, 2**31  # bytes; larger chunks are no faster on two cores
FIRST_CHUNK = 256  # rows of the first walk, which is watched: before it nothing is known about its memory
ROUNDING = 64  # units of rounding of a box's larger end, by which linear bounds of hidden neurons are widened
TEMPORARIES = 8  # tensors as large as the largest coefficients that a walk holds at a time
MIXING = {"linear", "conv2d", "avg_pool2d", "adaptive_avg_pool2d", "mean"}  # each output sums several inputs
MOVING = {"reshape", "permute", "index", "pad", "batch_norm", "mul", "div"}  # each output reads one input


class LinearBounds:
    """The boxes of a graph's nodes over a region, and linear bounds of rows over any node.

    Args:
        graph: of the model.
        model: its parameters are read now.
        region: the set of inputs.
        C: specification (S, K) or (B, S, K) of the interval bounds `final`; None: the logits.
        tighten: whether the boxes of activations' inputs come from linear bounds of their own (CROWN), each cut with
            its interval bounds and used by all that follow; otherwise from interval bounds (CROWN-IBP).
        memory_budget: bytes that coefficients may take at a time; None: 64 MiB on a CPU, 2 GiB elsewhere.
        slopes: for the walks from one side of one box, lower slopes (B, ...) by position of the activation.
        known: other bounds of the same graph and region, whose boxes these are cut with.

    Attributes:
        memory_budget: as above, a number.
        sides: the sides of the boxes that came from linear bounds: (node, 0 below or 1 above).
        values: of each node its value where it is fixed, its box where linear bounds need it, else the box's shape.
        final: interval bounds of the output, from the boxes above.
    """

    def __init__(
        self,
        graph: Graph,
        model: nn.Module,
        region: Region,
        C: Tensor | None = None,
        *,
        tighten: bool = True,
        memory_budget: int | None = None,
        slopes: Mapping[Side, Mapping[int, Tensor]] | None = None,
        known: LinearBounds | None = None,
    ) -> None:
        self.graph, self.model, self.region = graph, model, region
        self.sides: list[Side] = []
        self._slopes, self._known = slopes or {}, known
        self.values: list[Value | None] = [None] * len(graph.nodes)
        self._lines: dict[int, Lines] = {}
        self._readers = _readers(graph)
        self._tight = _tight_by_intervals(graph) if region.norm == "linf" else set()
        if memory_budget is not None and memory_budget < 1:
            raise ValueError(f"memory_budget must be a number of bytes, at least 1, got {memory_budget}")
        self.memory_budget = memory_budget or (CPU_BUDGET if region.lower.device.type == "cpu" else GPU_BUDGET)
        self._tighten = tighten
        self._row_bytes: dict[int, int] = {}
        self.final: Interval = propagate(graph, model, region.interval(), C, keep=self._keep)

    def take(self, rows: Tensor) -> LinearBounds:
        """Return the bounds of some samples, which may repeat."""
        part = LinearBounds.__new__(LinearBounds)
        part.__dict__.update(self.__dict__)
        part.region, part._lines, part._row_bytes = self.region.take(rows), {}, {}
        part.values = [_taken(value, rows) for value in self.values]
        return part

    def lower(self, at: int, rows: Rows, lines: Mapping[int, Lines] | None = None) -> Tensor:
        """Return lower bounds (N,) of rows over the value of node `at`.

        Args:
            at: position of the node.
            rows: over its value, in the order of their samples.
            lines: of some activations, in the place of their own.
        """
        found, start = [], 0
        while start < len(rows):
            stop = min(start + self._chunk(at), len(rows))
            found.append(self._least(at, rows if stop - start == len(rows) else rows.part(start, stop), lines or {}))
            start = stop
        return torch.cat(found) if found else rows.values.new_zeros(0)

    def coefficients(self, at: int, rows: Rows, lines: Mapping[int, Lines] | None = None) -> tuple[Rows, Tensor]:
        """Return (rows over the input, shift (N,)): a linear function of the input below each row over node `at`."""
        found, shift, _ = self._walk(at, rows, lines or {})
        return found, shift

    def lines(self, node: Node) -> Lines:
        """Return the lines around an activation over the present box of its operand."""
        if node.index not in self._lines:
            box = self.values[node.inputs[0]]
            assert isinstance(box, Interval)
            self._lines[node.index] = LINES[node.op](node, box)
        return self._lines[node.index]

    def undecided(self) -> Tensor:
        """Return the number (B,) of hidden neurons in each sample whose boxes walks of their own can tighten."""
        count = torch.zeros_like(self.region.lower[:, 0, 0, 0], dtype=torch.int64)
        for index, value in enumerate(self.values):
            if isinstance(value, Interval) and not isinstance(value, _Outline) and index not in self._tight:
                count = count + self._wanted(self.graph.nodes[index], value).flatten(1).sum(1)
        return count

    # The walk.

    def _least(self, at: int, rows: Rows, lines: Mapping[int, Lines]) -> Tensor:
        found, shift, largest = self._walk(at, rows, lines)
        self._row_bytes[at] = max(TEMPORARIES * largest * rows.values.element_size() // max(len(rows), 1), 1)
        return self.region.least(found) + shift

    def _walk(self, at: int, rows: Rows, lines: Mapping[int, Lines]) -> tuple[Rows, Tensor, int]:
        pending: dict[int, Rows] = {at: rows}
        shift, largest = rows.values.new_zeros(len(rows)), 0
        for node in reversed(self.graph.nodes[: at + 1]):
            over = pending.pop(node.index, None)
            if over is None:
                continue
            largest = max(largest, over.values.numel())
            if node.op == "input":
                return over, shift, largest
            parts, more = self._pull(node, over, lines)
            shift = shift if more is None else shift + more
            for operand, part in zip(node.inputs, parts, strict=True):
                if part is not None:
                    pending[operand] = part if operand not in pending else pending[operand].plus(part)
        raise ValueError("the rows never reach the input")  # a graph's output varies with the input

    def _pull(
        self, node: Node, rows: Rows, lines: Mapping[int, Lines]
    ) -> tuple[tuple[Rows | None, ...], Tensor | None]:
        if node.op in LINES:
            pulled, shift = _through(rows, lines.get(node.index) or self.lines(node))
            return (pulled,), shift
        if node.op not in LINEAR:
            raise UnsupportedOperator(f"{node.source}: {node.op} has interval bounds, but no linear ones; use 'ibp'")
        return LINEAR[node.op](node, rows, *[self.values[i] for i in node.inputs])

    def _chunk(self, at: int) -> int:
        """Return how many rows over a node may walk at a time."""
        if at not in self._row_bytes:
            return FIRST_CHUNK
        return max(self.memory_budget // self._row_bytes[at], 1)

    # The boxes.

    def _keep(self, node: Node, value: Value) -> Value:
        if not isinstance(value, Interval):
            self.values[node.index] = value
            return value
        needed = any(reader.op in LINES or reader.op in WANTED for reader in self._readers[node.index])
        if needed and self._tighten and node.index not in self._tight:
            value = self._tightened(node, value)
        self.values[node.index] = value if needed else _Outline.of(value)
        return value

    def _tightened(self, node: Node, box: Interval) -> Interval:
        """Return the box cut with linear bounds of the neurons for which that can matter."""
        known = None if self._known is None else self._known.values[node.index]
        if isinstance(known, Interval):
            box = box.intersect(known)
        owner, index = self._wanted(node, box).flatten(1).nonzero(as_tuple=True)
        if not len(owner):
            return box
        self.sides += [(node.index, 0), (node.index, 1)]
        one = torch.ones_like(owner, dtype=box.lower.dtype)
        shape, place = tuple(box.lower.shape[1:]), (owner, index)
        below, above = (OneHot(sign * one, owner, shape, index) for sign in (1, -1))
        slack = ROUNDING * torch.finfo(one.dtype).eps * torch.maximum(-box.lower, box.upper).flatten(1)[place]
        lower = self.lower(node.index, below, self._chosen(node.index, 0)) - slack
        upper = -self.lower(node.index, above, self._chosen(node.index, 1)) + slack
        found = Interval(
            box.lower.flatten(1).index_put(place, lower).reshape(box.lower.shape),
            box.upper.flatten(1).index_put(place, upper).reshape(box.upper.shape),
        )
        return box.intersect(found)

    def _chosen(self, at: int, side: int) -> dict[int, Lines]:
        """Return the lines of the activations whose slopes are given for the walks from one side of a box."""
        slopes = self._slopes.get((at, side), {})
        return {index: self.lines(self.graph.nodes[index]).chosen(slope) for index, slope in slopes.items()}

    def _wanted(self, node: Node, box: Interval) -> Tensor:
        wanted = torch.zeros_like(box.lower, dtype=torch.bool)
        for reader in self._readers[node.index]:
            if reader.op in LINES:
                wanted = wanted | ~LINES[reader.op](reader, box).exact
            elif reader.op in WANTED:
                wanted = wanted | WANTED[reader.op](reader, box)
        return wanted


class _Outline(Interval):
    """A box that claims nothing, for one sample: an affine operator needs no more of its operand than the shape."""

    @classmethod
    def of(cls, box: Interval) -> _Outline:
        infinity = box.lower.new_full((1,), torch.inf).expand(1, *box.lower.shape[1:])
        return cls(-infinity, infinity)


def specification_rows(C: Tensor, count: int) -> Dense:
    """Return the rows of a specification, (S, K) or (B, S, K), for `count` samples, sample by sample."""
    C = C.expand(count, *C.shape[-2:])
    owner = torch.arange(count, device=C.device).repeat_interleave(C.shape[1])
    return Dense(C.reshape(-1, C.shape[2]), owner, (C.shape[2],))


def _through(rows: Rows, lines: Lines) -> tuple[Rows, Tensor]:
    """Return rows over an activation as rows over its operand, below them, and their shift (N,)."""
    a, rising = rows.values, rows.values.clamp_min(0)
    slope, rise, shift, lift = rows.beside_each(
        lines.upper_slope,
        lines.lower_slope - lines.upper_slope,
        lines.upper_shift,
        lines.lower_shift - lines.upper_shift,
    )
    total = torch.addcmul(a * shift, rising, lift)
    total = total if total.ndim == 1 else total.sum(dim=tuple(range(1, total.ndim)))
    return replace(rows, values=torch.addcmul(a * slope, rising, rise)), total


def _taken(value: Value | None, rows: Tensor) -> Value | None:
    if not isinstance(value, Interval) or isinstance(value, _Outline):
        return value
    return Interval(value.lower[rows], value.upper[rows])


def _readers(graph: Graph) -> list[list[Node]]:
    readers: list[list[Node]] = [[] for _ in graph.nodes]
    for node in graph.nodes:
        for operand in node.inputs:
            readers[operand].append(node)
    return readers


def _tight_by_intervals(graph: Graph) -> set[int]:
    """Return the nodes whose interval bounds over a box of inputs are exact: those that sum inputs at most once.

    0: every coordinate is a scaled input of its own; 1: every coordinate's bounds are exact; 2: they need not be.
    """
    grade: list[int] = []
    for node in graph.nodes:
        operands = [i for i in node.inputs if graph.nodes[i].varies]
        highest = max((grade[i] for i in operands), default=0)
        copies = any(graph.nodes[i].shape != node.shape for i in operands) and node.op in ("add", "sub", "mul", "div")
        copies |= node.op == "cat" or (node.op == "pad" and node.attributes["mode"] != "constant")
        if node.op == "input" or not node.varies:
            grade.append(0)
        elif node.op in MIXING:
            grade.append(highest + 1)
        elif node.op in MOVING or (node.op in ("add", "sub") and len(operands) == 1):
            grade.append(max(highest, 1) if copies else highest)
        else:
            grade.append(max(highest, 1) if node.op == "cat" else 2)
    return {node.index for node in graph.nodes if grade[node.index] < 2}
