"""What attacks that see labels alone share: an adversarial start, and the way back to the boundary.

A decision is one candidate put to the oracle, so whatever is met on the way counts, nearest first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustbench_lite.attacks._purse import Purse
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams

__all__ = ["bisect", "cut", "fools", "noise", "random_start", "search_start", "straight"]

Blend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Clean images, far images (n, ...) and shares (n,) to images between them: 0 the clean ones, 1 the far ones."""
Draw = Callable[[Tensor, Streams, int], tuple[Tensor, Tensor | None]]
"""Rows (n,), their streams and the number of the draw to images (n, ...), and bool (n,): had any; None for all."""


def fools(oracle: Oracle, points: Tensor, rows: Tensor) -> Tensor:
    """Say which probes reach the goal, bool (n,): one query each. A row may come several times."""
    answers = oracle.labels(points, rows, candidate=False)
    return oracle.goal.take(rows).achieved(answers, oracle.rejects)


def search_start(
    oracle: Oracle, purse: Purse, rows: Tensor, streams: Streams, draws: int, draw: Draw
) -> tuple[Tensor, Tensor]:
    """Draw images for `rows` until one is adversarial, one query each; return the rows that have one, and the images.

    The streams are those of the whole batch.
    """
    starts, found = oracle.x.clone(), torch.zeros_like(oracle.found.fallen)
    for number in range(draws):
        rows = rows[purse.still(rows)]
        if len(rows) == 0:
            break
        points, drawn = draw(rows, streams.take(rows), number)
        rows, points = (rows, points) if drawn is None else (rows[drawn], points[drawn])
        if len(rows) == 0:
            break
        oracle.labels(points, rows)
        hit = oracle.verdict
        starts[rows[hit]], found[rows[hit]] = points[hit], True
        rows = rows[~hit]
    rows = found.nonzero().flatten()
    rows = rows[purse.still(rows)]
    return rows, starts[rows]


def random_start(oracle: Oracle, purse: Purse, rows: Tensor, streams: Streams, draws: int) -> tuple[Tensor, Tensor]:
    """Draw noise images for `rows` until one is adversarial; as `search_start`.

    Uniform noise in every pixel comes first; then its tiles double in side from draw to draw, and start over. Nets
    that put all fine noise into one class need the coarse, and so do targets.
    """

    def draw(rows: Tensor, own: Streams, number: int) -> tuple[Tensor, None]:
        return noise(oracle.x[rows], own, number, oracle.threat.bounds), None

    return search_start(oracle, purse, rows, streams, draws, draw)


def noise(x: Tensor, streams: Streams, draw: int, bounds: tuple[float, float]) -> Tensor:
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


def cut(x: Tensor, far: Tensor, share: Tensor) -> Tensor:
    """Cut the change from `x` to `far` to a share of its largest entry."""
    change = far - x
    reach = share.reshape(-1, 1, 1, 1) * change.abs().amax(dim=(1, 2, 3), keepdim=True)
    return x + change.clamp(-reach, reach)


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
