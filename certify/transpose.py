"""The transpose of an affine map, by differentiation: for maps that have no faster one written out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustbench_lite.certify.rows import Dense, Rows

__all__: list[str] = []


def transposed(affine: Callable[[Tensor], Tensor], rows: Rows, shape: tuple[int, ...]) -> Dense:
    """Return rows over the value of an affine map as rows over its operand; its shift is left to the caller.

    The rows a over A v + b are the rows a A over v: the vector-Jacobian product of a.

    Args:
        affine: from (N, *shape) to (N, *rows.shape).
        rows: over the value.
        shape: of the operand, without the batch.
    """
    a = rows.dense().values
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        origin = a.new_zeros(len(a), *shape).requires_grad_()
        (values,) = torch.autograd.grad(affine(origin), origin, a, create_graph=keep)
    return Dense(values, rows.owner, shape)
