"""Piecewise linear operators in a mixed-integer programme: one rule per operator.

A rule is given bounds l <= z <= u of its operand. Where these leave only one piece, no variable is needed. Elsewhere a
binary variable d says which piece holds; taken as a fraction instead, the same rows are the convex hull of the graph of
a ReLU over [l, u] (the "triangle").

Source: Tjeng, Xiao, Tedrake, "Evaluating Robustness of Neural Networks with Mixed Integer Programming", 2019,
arXiv:1711.07356. Departure: LeakyReLU, by the same rows with another slope.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from robustbench_lite.certify._affine import Affine
from robustbench_lite.certify._milp import Programme
from robustbench_lite.certify.ir import Node

__all__: list[str] = []

Floats: TypeAlias = NDArray[np.float64]
Encoding: TypeAlias = Callable[[Programme, Node, Affine, Floats, Floats, Any], Affine]

ENCODINGS: dict[str, Encoding] = {}  # called as rule(programme, node, operand, lower, upper, matrix of the operator)


def encoding(op: str) -> Callable[[Encoding], Encoding]:
    """Register the rule of an operator."""

    def register(rule: Encoding) -> Encoding:
        ENCODINGS[op] = rule
        return rule

    return register


@encoding("relu")
def encode_relu(programme: Programme, node: Node, z: Affine, lower: Floats, upper: Floats, matrix: Any) -> Affine:
    """Return max(z, 0)."""
    return _two_slopes(programme, z, lower, upper, 0.0)


@encoding("leaky_relu")
def encode_leaky_relu(programme: Programme, node: Node, z: Affine, lower: Floats, upper: Floats, matrix: Any) -> Affine:
    """Return z where z >= 0 and slope * z elsewhere."""
    return _two_slopes(programme, z, lower, upper, node.attributes["negative_slope"])


def _two_slopes(programme: Programme, z: Affine, lower: Floats, upper: Floats, slope: float) -> Affine:
    """Return a = z if d else slope * z, for each entry.

    With bend = 1 - slope >= 0, a is the larger of z and slope * z:

        a >= z,  a >= slope * z,  a <= z - bend * l * (1 - d),  a <= slope * z + bend * u * d.

    With bend < 0 it is the smaller one, and every row is turned round.
    """
    bend = 1.0 - slope
    unstable = np.flatnonzero((lower < 0) & (upper > 0) & (bend != 0))
    known = np.where(lower >= 0, 1.0, slope)
    known[unstable] = 0.0
    if not len(unstable):
        return z.scaled(known)
    low, high, part = lower[unstable], upper[unstable], z.rows(unstable)
    ends = np.stack([high, slope * low, np.zeros_like(low)])  # a leaky entry's extremes are at its ends or its bend
    a = programme.variables(ends.min(axis=0), ends.max(axis=0))
    d = programme.variables(np.zeros_like(low), np.ones_like(low), integral=True)
    turn = np.full(len(low), np.sign(bend))
    for row in (
        part - a,
        part.scaled(np.full(len(low), slope)) - a,
        a - part + d.scaled(-bend * low).shifted(bend * low),
        a - part.scaled(np.full(len(low), slope)) - d.scaled(bend * high),
    ):
        programme.require(row.scaled(turn))
    return z.scaled(known) + a.mapped(_placed(unstable, len(lower)))


@encoding("max_pool2d")
def encode_max_pool(programme: Programme, node: Node, z: Affine, lower: Floats, upper: Floats, matrix: Any) -> Affine:
    """Return the maximum m of each window: m >= z_i for all i, and m <= z_i + (highest other u - l_i) (1 - d_i).

    Only entries that can be the largest have a d_i; one of them is 1.
    """
    windows = sparse.csr_array(matrix)
    rows, columns = windows.nonzero()
    floor = np.full(windows.shape[0], -np.inf)
    np.maximum.at(floor, rows, lower[columns])
    eligible = upper[columns] >= floor[rows]
    rows, columns = rows[eligible], columns[eligible]
    choices = np.bincount(rows, minlength=len(floor))
    alone = choices[rows] == 1
    settled = sparse.csr_array((np.ones(alone.sum()), (rows[alone], columns[alone])), shape=windows.shape)
    if alone.all():
        return z.mapped(settled)
    return z.mapped(settled) + _chosen(programme, z, (lower, upper), rows[~alone], columns[~alone], floor)


def _chosen(
    programme: Programme,
    z: Affine,
    bounds: tuple[Floats, Floats],
    rows: NDArray[np.intp],
    columns: NDArray[np.intp],
    floor: Floats,
) -> Affine:
    """Return the maxima, at their places among all windows, whose window has several eligible entries."""
    lower, upper = bounds[0][columns], bounds[1][columns]
    open_windows, window = np.unique(rows, return_inverse=True)
    top = np.full(len(open_windows), -np.inf)
    np.maximum.at(top, window, upper)
    m = programme.variables(floor[open_windows], top)
    d = programme.variables(np.zeros_like(lower), np.ones_like(lower), integral=True)
    others = np.array([upper[(window == w) & (np.arange(len(window)) != i)].max() for i, w in enumerate(window)])
    largest, entry = m.rows(window), z.rows(columns)
    programme.require(entry - largest)
    slack = np.maximum(others - lower, 0.0)
    programme.require(largest - entry + d.scaled(slack).shifted(-slack))
    one_each = sparse.csr_array((np.ones(len(window)), (window, np.arange(len(window)))))
    programme.require(d.mapped(one_each).shifted(np.full(len(open_windows), -1.0)), equal=True)
    return m.mapped(_placed(open_windows, len(floor)))


def _placed(places: NDArray[np.intp], size: int) -> Any:
    """Return the matrix that puts entries at their places among `size`."""
    return sparse.csr_array((np.ones(len(places)), (places, np.arange(len(places)))), shape=(size, len(places)))
