"""What attacks that see labels alone share: a purse, an adversarial start, and the way back to the boundary.

A decision is one candidate put to the oracle, so whatever is met on the way counts, nearest first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams

__all__ = ["Purse", "bisect", "fools", "random_start", "straight"]

Blend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Clean images, far images (n, ...) and shares (n,) to images between them: 0 the clean ones, 1 the far ones."""


class Purse:
    """The label queries that samples may still spend: the oracle's budget and the attack's own limit.

    Args:
        oracle: the oracle that counts.
        queries: most queries a sample spends from now on; None for no limit but the oracle's.
    """

    def __init__(self, oracle: Oracle, queries: int | None) -> None:
        self._oracle = oracle
        self._end = None if queries is None else oracle.forwards + queries

    @property
    def compact_every(self) -> int:
        """Steps between two looks at who still stands, as the oracle's; a limit needs each one."""
        return self._oracle.compact_every if self._end is None else 1

    def left(self, rows: Tensor) -> Tensor:
        """Return the queries left to `rows`, int64 (n,); 2^62 where nothing limits them."""
        spent = self._oracle.forwards[rows]
        left = torch.full_like(spent, 2**62)
        if self._oracle.max_queries is not None:
            left = self._oracle.max_queries - spent
        return left if self._end is None else torch.minimum(left, self._end[rows] - spent)

    def still(self, rows: Tensor, queries: int = 1) -> Tensor:
        """Return the positions within `rows` of those that still search and can pay."""
        keep = self._oracle.still(rows, queries)
        return keep if self._end is None else keep[self.left(rows[keep]) >= queries]


def fools(oracle: Oracle, points: Tensor, rows: Tensor) -> Tensor:
    """Say which probes reach the goal, bool (n,): one query each. A row may come several times."""
    answers = oracle.labels(points, rows, candidate=False)
    return oracle.goal.take(rows).achieved(answers, oracle.rejects)


def random_start(oracle: Oracle, purse: Purse, streams: Streams, draws: int) -> tuple[Tensor, Tensor]:
    """Draw noise images until one is adversarial, one query each; return the rows that have one, and the images.

    Uniform noise in every pixel comes first; then its tiles double in side from draw to draw, and start over. Nets
    that put all fine noise into one class need the coarse, and so do targets.
    """
    starts, found = oracle.x.clone(), torch.zeros_like(oracle.found.fallen)
    rows = oracle.standing()
    for draw in range(draws):
        rows = rows[purse.still(rows)]
        if len(rows) == 0:
            break
        points = _noise(oracle.x[rows], streams.take(rows), draw, oracle.threat.bounds)
        oracle.labels(points, rows)
        hit = oracle.verdict
        starts[rows[hit]], found[rows[hit]] = points[hit], True
        rows = rows[~hit]
    rows = found.nonzero().flatten()
    rows = rows[purse.still(rows)]
    return rows, starts[rows]


def _noise(x: Tensor, streams: Streams, draw: int, bounds: tuple[float, float]) -> Tensor:
    """Return uniform noise in tiles, a number of each draw's own kind for each sample: (n, C, H, W)."""
    height, width = x.shape[-2:]
    side = 2 ** (draw % max(height, width).bit_length())
    uniform = streams.uniform(*x.shape[1:], dtype=x.dtype)
    down, right = (torch.arange(length, device=x.device) // side for length in (height, width))
    low, high = bounds
    return (low + (high - low) * uniform[:, :, down][:, :, :, right]).clamp(low, high)


def straight(x: Tensor, far: Tensor, share: Tensor) -> Tensor:
    """Blend along the line from `x` to `far`; a share of 1 gives `far` to the bit."""
    return torch.lerp(x, far, share.reshape(-1, 1, 1, 1))


def bisect(oracle: Oracle, purse: Purse, rows: Tensor, far: Tensor, steps: int, blend: Blend = straight) -> Tensor:
    """Halve the way from the clean images to adversarial ones `far` (n, ...), `steps` times, one query each.

    Returns:
        Images (n, ...) that are adversarial: the last ones met, or `far`. A sample that cannot pay, or is done, stops.
    """
    x, (lowest, highest) = oracle.x[rows], oracle.threat.bounds
    low, high = far.new_zeros(len(rows)), far.new_ones(len(rows))
    nearest = far.clone()
    active = torch.arange(len(rows), device=rows.device)
    for _ in range(steps):
        active = active[purse.still(rows[active])]
        if len(active) == 0:
            break
        middle = (low[active] + high[active]) / 2
        points = blend(x[active], far[active], middle).clamp(lowest, highest)
        oracle.labels(points, rows[active])
        hit = oracle.verdict
        high[active[hit]], nearest[active[hit]] = middle[hit], points[hit]
        low[active[~hit]] = middle[~hit]
    return nearest
