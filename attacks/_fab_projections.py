"""The nearest point on a hyperplane within the image bounds, in linf, l2 and l1 (Croce and Hein 2019, 1907.02044).

All functions take rows: `normal` (n, D), the `gain` (n, 1) that <normal, d> should reach, and the box of displacements,
`low` <= 0 <= `high`, each (n, D). They return the d (n, D) of least norm; where the box does not reach the hyperplane,
the d in the box that comes nearest to it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["NEAREST", "nearest_l1", "nearest_l2", "nearest_linf"]

ROUNDS = 64  # of Newton's method, which is exact once the set of clipped entries stays


def nearest_linf(normal: Tensor, gain: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Every entry moves by the same length, or as far as the box allows."""
    slope, gain, room, sign = _towards(normal, gain, low, high)
    return sign * torch.minimum(_level(slope, torch.ones_like(slope), room, gain), room)


def nearest_l2(normal: Tensor, gain: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Every entry moves in proportion to the normal, or as far as the box allows."""
    slope, gain, room, sign = _towards(normal, gain, low, high)
    level = _level(slope, slope, room, gain).clamp_max(torch.finfo(slope.dtype).max)  # +inf times slope 0 is NaN
    return sign * torch.minimum(level * slope, room)


def nearest_l1(normal: Tensor, gain: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The steepest entries move as far as the box allows, one after the other, until the gain is reached."""
    slope, gain, room, sign = _towards(normal, gain, low, high)
    steepest, order = slope.sort(dim=1, descending=True, stable=True)
    most = steepest * room.gather(1, order)
    missing = gain - (most.cumsum(dim=1) - most)
    share = (missing / most.clamp_min(torch.finfo(most.dtype).tiny)).clamp(0, 1)
    return sign * room * torch.zeros_like(share).scatter(1, order, share)


NEAREST: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "linf": nearest_linf,
    "l2": nearest_l2,
    "l1": nearest_l1,
}


def _towards(normal: Tensor, gain: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return |normal|, |gain|, and for each entry its room on the side that gains, and the sign of that side.

    Where the normal is 0 there is no such side, and no room. Normal and gain are divided by the normal's largest entry:
    squares of tiny gradients underflow in float32.
    """
    largest = normal.abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest > 0, largest, 1)
    sign = normal.sign() * torch.where(gain < 0, -1, 1).to(normal.dtype)
    return normal.abs() / scale, gain.abs() / scale, torch.maximum(sign * high, sign * low).clamp_min(0), sign


def _level(slope: Tensor, speed: Tensor, room: Tensor, gain: Tensor) -> Tensor:
    """Return the level t (n, 1) with sum_i slope_i * min(t * speed_i, room_i) = gain; +inf where no t reaches it.

    The sum is concave in t, so Newton's method from t = 0 rises to the solution, and never beyond it.
    """
    level = torch.zeros_like(gain)
    limits, full, rates = room / speed.clamp_min(torch.finfo(speed.dtype).tiny), slope * room, slope * speed
    mask = torch.empty_like(slope)  # 0 and 1 as numbers: booleans take a CPU five times as long
    for _ in range(ROUNDS):
        rate = (torch.gt(limits, level, out=mask) * rates).sum(dim=1, keepdim=True)
        missing = gain - (torch.le(limits, level, out=mask) * full).sum(dim=1, keepdim=True)
        higher = torch.where(rate > 0, missing / rate, torch.where(missing > 0, torch.inf, level))
        higher = torch.maximum(higher, level)
        if level.device.type == "cpu" and torch.equal(higher, level):
            break
        level = higher
    return level
