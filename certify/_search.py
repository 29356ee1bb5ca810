"""The largest value of a function of one number, for many functions at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__: list[str] = []

Array = NDArray[np.float64]

GOLDEN = (5**0.5 - 1) / 2
STEPS = 40  # 0.618^40 = 4e-9 of a cell of the grid


def largest(value: Callable[[Array], Array], grid: Array) -> Array:
    """Return the largest value (B,) found over `grid` (G,) and, by golden sections, around its best point.

    `value` maps points (B, G) or (1, G) to values (B, G). Every value found is a value of the function.
    """
    values = value(grid[None, :])
    best = values.argmax(axis=1)
    low, high = grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, len(grid) - 1)]
    found = values.max(axis=1)
    for _ in range(STEPS):
        inner = np.stack([high - GOLDEN * (high - low), low + GOLDEN * (high - low)], axis=1)
        two = value(inner)
        found = np.maximum(found, two.max(axis=1))
        left = two[:, 0] >= two[:, 1]
        low, high = np.where(left, low, inner[:, 0]), np.where(left, inner[:, 1], high)
    return np.asarray(found)
