"""Ascent over the slopes that linear bounds are free to choose: what makes CROWN alpha-CROWN.

Where an activation may be replaced from below by any of a family of lines (a ReLU that is neither on nor off: slopes 0
to 1 through the origin), each row of bounds has a best choice of its own. Every choice gives a sound bound, so the
ascent may stop anywhere, and keeps the best it has met.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustbench_lite.certify.linear_bounds import LinearBounds
from robustbench_lite.certify.lines import Lines
from robustbench_lite.certify.operators.registry import LINES
from robustbench_lite.certify.rows import Dense

__all__: list[str] = []

GRAPH_TENSORS = 6  # tensors of the size of each node that the graph of one row keeps


@dataclass(frozen=True)
class Ascent:
    """Projected Adam (Kingma and Ba 2014, arXiv:1412.6980) with a step size that falls geometrically.

    Attributes:
        steps: updates.
        step_size: of the first update.
        decay: factor from one step size to the next.
        target: rows whose bound exceeds it leave.
    """

    steps: int = 20
    step_size: float = 0.25
    decay: float = 0.95
    target: float = torch.inf

    def best(self, net: LinearBounds, rows: Dense) -> Tensor:
        """Return the best lower bounds (N,) found of rows over the output, chunk by chunk."""
        found = [self._ascended(net, chunk, None) for chunk in _chunks(net, rows)]
        return torch.cat(found) if found else rows.values.new_zeros(0)

    def best_slopes(self, net: LinearBounds, rows: Dense) -> dict[int, Tensor]:
        """Return the slopes (N, ...) of the best bounds found, by position of the activation."""
        slopes = {index: lines.lower_slope[rows.samples] for index, lines in free_lines(net).items()}
        start = 0
        for chunk in _chunks(net, rows):
            self._ascended(net, chunk, {index: slope[start : start + len(chunk)] for index, slope in slopes.items()})
            start += len(chunk)
        return slopes

    def _ascended(self, net: LinearBounds, rows: Dense, remember: Mapping[int, Tensor] | None) -> Tensor:
        """Return the best bounds of rows; `remember` takes their slopes, written in place."""
        net, rows = net.take(rows.samples), replace(rows, owner=None)  # each row is a sample of its own from here on
        fixed = free_lines(net)
        climb = Climb([lines.lower_slope for lines in fixed.values()], self)
        best = torch.full_like(rows.values[:, 0], -torch.inf)
        live = torch.arange(len(rows), device=best.device)
        for step in range(self.steps + 1):
            value, gradients = _valued(net, rows, fixed, climb.slopes, last=step == self.steps)
            better = value > best[live]
            best[live] = torch.where(better, value, best[live])
            for index, slope in zip(fixed, climb.slopes, strict=True):
                if remember is not None:
                    remember[index][live[better]] = slope[better]
            if step == self.steps or not fixed:
                break
            climb.step(gradients, list(fixed.values()))
            keep = (best[live] <= self.target).nonzero().flatten()
            if len(keep) == 0:
                break
            if len(keep) < len(live):
                net, rows, live = net.take(keep), rows.take(keep), live[keep]
                rows = replace(rows, owner=None)
                fixed = {index: lines.take(keep) for index, lines in fixed.items()}
                climb.take(keep)
        return best


class Climb:
    """The state of Adam over several tensors, whose first dimension can shrink."""

    def __init__(self, slopes: Sequence[Tensor], rule: Ascent) -> None:
        self.slopes, self._rule, self._steps = [slope.detach().clone() for slope in slopes], rule, 0
        self._mean = [torch.zeros_like(slope) for slope in slopes]
        self._square = [torch.zeros_like(slope) for slope in slopes]

    @torch.no_grad()  # a projection that autograd saw would stop the slopes at their bounds for good
    def step(self, gradients: Sequence[Tensor], lines: Sequence[Lines]) -> None:
        """Move up the gradients, and back between the least and the most slope."""
        size = self._rule.step_size * self._rule.decay**self._steps
        self._steps += 1
        flat, steep = 1 - 0.9**self._steps, 1 - 0.999**self._steps
        for slope, gradient, mean, square, line in zip(
            self.slopes, gradients, self._mean, self._square, lines, strict=True
        ):
            mean.lerp_(gradient, 0.1)
            square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            slope.addcdiv_(mean, (square / steep).sqrt_().add_(1e-8), value=size / flat)
            slope.clamp_(line.least, line.most)

    def take(self, keep: Tensor) -> None:
        """Go on with some of the rows."""
        self.slopes, self._mean, self._square = (
            [t[keep] for t in ts] for ts in (self.slopes, self._mean, self._square)
        )


def free_lines(net: LinearBounds) -> dict[int, Lines]:
    """Return the lines of the activations that have a free slope somewhere, by position."""
    with torch.no_grad():
        nodes = [node for node in net.graph.nodes[: net.graph.output + 1] if node.op in LINES and node.varies]
        every = {node.index: net.lines(node) for node in nodes}
        return {
            index: replace(lines, free=lines.free.to(lines.lower_slope.dtype))  # once, not at each step
            for index, lines in every.items()
            if lines.free is not None and bool(lines.free.any())
        }


def _valued(
    net: LinearBounds, rows: Dense, fixed: Mapping[int, Lines], slopes: Sequence[Tensor], last: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return the bounds (N,) under these slopes, and their gradients unless this is the last look."""
    leaves = [slope.detach().requires_grad_(not last) for slope in slopes]
    with torch.set_grad_enabled(not last):
        lines = {index: own.chosen(slope) for (index, own), slope in zip(fixed.items(), leaves, strict=True)}
        found, shift = net.coefficients(net.graph.output, rows, lines)
        value = net.region.least(found) + shift
        total = value.sum()
    if last or not leaves:
        return value.detach(), []
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return value.detach(), [
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(leaves, gradients, strict=True)
    ]


def _chunks(net: LinearBounds, rows: Dense) -> list[Dense]:
    """Return the rows in chunks whose graphs fit into the budget."""
    nodes = net.graph.nodes[: net.graph.output + 1]
    entries = sum(math.prod(node.shape) for node in nodes if node.varies)
    size = max(net.memory_budget // (GRAPH_TENSORS * entries * rows.values.element_size()), 1)
    return [rows.part(start, start + size) for start in range(0, len(rows), size)]
