"""Values as affine functions of a programme's variables, and affine operators as sparse matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.ir import Node
from robustbench_lite.certify.operators import registry

__all__: list[str] = []

Floats = NDArray[np.float64]

CHUNK = 256  # basis images at a time


@dataclass(frozen=True, eq=False)
class Affine:
    """matrix @ variables + offset.

    Attributes:
        matrix: sparse (n, V) over the first V variables of a programme.
        offset: (n,).
    """

    matrix: Any
    offset: Floats

    def widened(self, columns: int) -> Affine:
        """Return the same function over `columns` variables."""
        parts = self.matrix.data, self.matrix.indices, self.matrix.indptr
        return Affine(sparse.csr_array(parts, shape=(len(self.offset), columns)), self.offset)

    def __add__(self, other: Affine) -> Affine:
        """Add entry by entry."""
        columns = max(self.matrix.shape[1], other.matrix.shape[1])
        a, b = self.widened(columns), other.widened(columns)
        return Affine(a.matrix + b.matrix, a.offset + b.offset)

    def __sub__(self, other: Affine) -> Affine:
        """Subtract entry by entry."""
        return self + other.scaled(np.full(len(other.offset), -1.0))

    def scaled(self, factor: Floats) -> Affine:
        """Multiply each entry by its factor."""
        return self.mapped(sparse.diags_array(factor, format="csr"))

    def shifted(self, shift: Floats) -> Affine:
        """Add a number to each entry."""
        return Affine(self.matrix, self.offset + shift)

    def mapped(self, matrix: Any) -> Affine:
        """Apply a matrix (m, n)."""
        return Affine(sparse.csr_array(matrix @ self.matrix), matrix @ self.offset)

    def rows(self, places: NDArray[np.intp]) -> Affine:
        """Return some of the entries."""
        return Affine(self.matrix[places], self.offset[places])

    def at(self, point: Floats) -> Floats:
        """Return the values at a point of the programme."""
        values: Floats = self.matrix @ point[: self.matrix.shape[1]] + self.offset
        return values


def matrices(
    node: Node, operands: Sequence[Tensor | None], shapes: Sequence[tuple[int, ...]]
) -> tuple[list[Any], Floats]:
    """Return what an affine operator does to flat operands: a sparse matrix (outputs, inputs) for each, and the offset.

    They are read off the operator's interval rule, at boxes of one point: the basis vectors, in float64. For a maximum
    of non-negative entries, the matrix tells which entries take part in which maximum.

    Args:
        node: the operator.
        operands: its operands; None where one varies with the input.
        shapes: of the varying operands, in order, without the batch.
    """
    varying = [place for place, operand in enumerate(operands) if operand is None]
    sizes = dict(zip(varying, shapes, strict=True))

    def value(place: int, basis: Tensor) -> Tensor:
        given: list[Any] = list(operands)
        for i, shape in sizes.items():
            point = basis if i == place else torch.zeros(len(basis), *shape, dtype=torch.float64)
            given[i] = Interval(point, point)
        return registry.INTERVAL[node.op](node, *given).lower.flatten(1)

    offset = value(varying[0], torch.zeros(1, *sizes[varying[0]], dtype=torch.float64))
    found = []
    for place in varying:
        blocks = [sparse.csr_array((value(place, basis) - offset).numpy()) for basis in _bases(sizes[place])]
        found.append(sparse.csr_array(sparse.vstack(blocks, format="csr").T))
    return found, offset[0].numpy()


def _bases(shape: tuple[int, ...]) -> Iterator[Tensor]:
    size = math.prod(shape)
    for first in range(0, size, CHUNK):
        count = min(CHUNK, size - first)
        rows = torch.zeros(count, size, dtype=torch.float64)
        rows[torch.arange(count), first + torch.arange(count)] = 1.0
        yield rows.reshape(count, *shape)
