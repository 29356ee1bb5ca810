"""The set of inputs that bounds range over, and the least value of linear functions on it.

The set is the part of an Lp ball {v : |v - x|_p <= eps} that lies in the image box [lower, upper]; the box alone for
linf. The least value of sum(a * v) over it:

- linf: each coordinate at the end of the box that its coefficient prefers. Exact.
- l1: a fractional knapsack: coordinates in the order of |a|, each as far as the box or the rest of the budget lets it.
  Exact.
- l0: the k coordinates (pixels) that gain most, each at its end of the box. Exact.
- l2: the Lagrange dual max_m min_{v in box} sum(a * v) + m / 2 (|v - x|^2 - eps^2). Every m >= 0 gives a lower
  bound, so an inexact search is sound; the inner minimum is attained at v = clamp(x - a / m).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustbench_lite.certify.intervals import Ball, Interval
from robustbench_lite.certify.rows import Patch, Rows

__all__: list[str] = []

SEARCH_STEPS = 16  # halvings of log m from a factor of 1e6: m to 2e-4, and the dual, flat at its maximum, to 1e-7


@dataclass(frozen=True, eq=False)
class Region:
    """A set of images around each sample.

    Attributes:
        lower: (B, C, H, W), ends of the box.
        upper: (B, C, H, W).
        norm: "linf", where the box is the set; "l2", "l1" or "l0", where a ball cuts it.
        centre: (B, C, H, W) of the ball.
        eps: (B,) its radius; for l0 a number of pixels or coordinates.
        per: for l0, "pixel" or "coordinate".
    """

    lower: Tensor
    upper: Tensor
    norm: str = "linf"
    centre: Tensor | None = None
    eps: Tensor | None = None
    per: str = "pixel"

    def interval(self) -> Interval:
        """Return the box, with the ball it holds where interval bounds know how to use it."""
        if self.centre is None or self.eps is None or self.norm == "l0":
            return Interval(self.lower, self.upper)
        ball = Ball(self.norm, self.eps, self.centre, torch.ones_like(self.centre[:1]))
        return Interval(self.lower, self.upper, ball)

    def take(self, rows: Tensor) -> Region:
        """Return the sets of some samples, which may repeat."""
        centre = None if self.centre is None else self.centre[rows]
        eps = None if self.eps is None else self.eps[rows]
        return replace(self, lower=self.lower[rows], upper=self.upper[rows], centre=centre, eps=eps)

    def least(self, rows: Rows) -> Tensor:
        """Return the least value (N,) of each row over its sample's set; for l2 a lower bound of it."""
        if not isinstance(rows, Patch):
            rows = rows.dense()
        middle = rows.dot((self.lower + self.upper) / 2)
        width = replace(rows, values=rows.values.abs()).dot((self.upper - self.lower) / 2)
        boxed = middle - width
        if self.centre is None or self.eps is None:
            return boxed
        a, centre = rows.values.flatten(2), rows.beside(self.centre).flatten(2)
        low = (rows.beside(self.lower).flatten(2) - centre).clamp_max(0)
        high = (rows.beside(self.upper).flatten(2) - centre).clamp_min(0)
        eps = rows.owned(self.eps).expand(len(rows))
        change = _CHANGES[self.norm](a, low, high, eps, self.per)
        return torch.maximum(boxed, (a * centre).flatten(1).sum(1) + change)


def _l1_change(a: Tensor, low: Tensor, high: Tensor, eps: Tensor, per: str) -> Tensor:
    slope = a.abs().flatten(1)
    room = torch.where(a > 0, -low, high).flatten(1)
    order = slope.argsort(dim=1, descending=True)
    slope, room = slope.gather(1, order), room.gather(1, order)
    before = room.cumsum(1) - room
    return -(slope * torch.minimum(room, (eps.unsqueeze(1) - before).clamp_min(0))).sum(1)


def _l0_change(a: Tensor, low: Tensor, high: Tensor, eps: Tensor, per: str) -> Tensor:
    gain = torch.where(a > 0, -a * low, -a * high)
    gain = gain.sum(1) if per == "pixel" else gain.flatten(1)
    count = eps.floor().long().clamp(0, gain.shape[1])
    sums = torch.cat([gain.new_zeros(len(gain), 1), gain.sort(dim=1, descending=True).values.cumsum(1)], dim=1)
    return -sums.gather(1, count.unsqueeze(1)).squeeze(1)


def _l2_change(a: Tensor, low: Tensor, high: Tensor, eps: Tensor, per: str) -> Tensor:
    a, low, high = (t.expand_as(a).flatten(1) for t in (a, low, high))
    norm = a.norm(dim=1)
    with torch.no_grad():
        most = torch.where(norm > 0, norm, 1) / eps.clamp_min(1e-30)  # the best m of a ball without a box: steps fit
        least = 1e-6 * most
        for _ in range(SEARCH_STEPS):
            middle = (least * most).sqrt()
            far = (-a / middle.unsqueeze(1)).clamp(low, high).norm(dim=1) > eps
            least, most = torch.where(far, middle, least), torch.where(far, most, middle)
    step = (-a / most.unsqueeze(1)).clamp(low, high)
    dual = (a * step).sum(1) + most / 2 * (step.square().sum(1) - eps.square())
    return torch.where(eps > 0, torch.maximum(dual, -norm * eps), 0)


_CHANGES = {"l2": _l2_change, "l1": _l1_change, "l0": _l0_change}
