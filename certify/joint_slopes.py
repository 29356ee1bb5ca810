"""Ascent over the slopes of all walks at once: those from the hidden layers' boxes too."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from robustbench_lite.certify.linear_bounds import LinearBounds
from robustbench_lite.certify.lines import Lines
from robustbench_lite.certify.rows import Dense
from robustbench_lite.certify.slopes import Ascent, Climb, free_lines

__all__: list[str] = []

Keys = list[tuple[tuple[int, int] | None, int]]


def ascend_jointly(ascent: Ascent, net: LinearBounds, rows: Dense) -> Tensor:
    """Return the best lower bounds (N,) found of rows over the output.

    Each side of each hidden box has slopes of its own, shared by its neurons; each row has slopes of its own for the
    last walk. Every step computes all boxes anew, and cuts them with those of `net`; it keeps their graph, which no
    memory budget counts.

    Args:
        ascent: the rule.
        net: CROWN's boxes.
        rows: over the output.
    """
    last = free_lines(net)
    keys: Keys = [(None, index) for index in last]
    keys += [(side, index) for side in net.sides for index in last if index < side[0]]
    samples = rows.samples
    lines = [last[index].take(samples) if side is None else last[index] for side, index in keys]
    climb = Climb([own.lower_slope for own in lines], ascent)
    best = torch.full_like(rows.values[:, 0], -torch.inf)
    for step in range(ascent.steps + 1):
        leaves = [slope.requires_grad_(step < ascent.steps) for slope in climb.slopes]
        with torch.set_grad_enabled(step < ascent.steps):
            value = _value(net, rows, keys, leaves)
            total = value[(value <= ascent.target).detach()].sum()
        best = torch.maximum(best, value.detach())
        if step == ascent.steps or not total.requires_grad or bool((best > ascent.target).all()):
            break
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        climb.slopes = [leaf.detach() for leaf in leaves]
        climb.step([torch.zeros_like(s) if g is None else g for s, g in zip(leaves, gradients, strict=True)], lines)
    return best


def _value(net: LinearBounds, rows: Dense, keys: Keys, slopes: list[Tensor]) -> Tensor:
    sides: dict[tuple[int, int], dict[int, Tensor]] = {side: {} for side in net.sides}
    own: dict[int, Tensor] = {}
    for (side, index), slope in zip(keys, slopes, strict=True):
        (own if side is None else sides[side])[index] = slope
    again = LinearBounds(net.graph, net.model, net.region, memory_budget=net.memory_budget, slopes=sides, known=net)
    again = again.take(rows.samples)
    lines: dict[int, Lines] = {
        index: again.lines(again.graph.nodes[index]).chosen(slope) for index, slope in own.items()
    }
    found, shift = again.coefficients(again.graph.output, replace(rows, owner=None), lines)
    return again.region.least(found) + shift
