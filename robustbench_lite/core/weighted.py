"""Weighted Lp balls: changes count for more where the clean image is flat.

The size of a change d to the image x is ||w * d||_p with w_i = 1 / max(SD_i, floor), where SD_i is the standard
deviation of x over the 3 x 3 neighbourhood of i (the part of it inside the image, one channel at a time): noise hides
in texture. For p = 1 it is the distance of Luo, Liu, Wei and Xu 2018, "Towards Imperceptible and Robust Adversarial
Example Attacks against Neural Networks" (1801.04693), whose sensitivity is w without a floor.

It is a threat of its own and no `Lp`: who reads eps as the radius of an Lp ball, a certifier for one, would be wrong.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_lite.core.checks import parse_number
from robustbench_lite.core.errors import lookup
from robustbench_lite.core.norms import NORMS, Norm, stuck
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import TOLERANCE, Threat, ordered_bounds

__all__ = ["WeightedLp", "local_deviation"]

WEIGHTED = ("linf", "l2", "l1")
HALVINGS = 64  # of the multiplier's bracket: down to the last bits of float64


def local_deviation(x: Tensor) -> Tensor:
    """Return the standard deviation, float64 (B, C, H, W), of each 3 x 3 neighbourhood, cut at the image's border.

    >>> round(local_deviation(torch.tensor([[[[0.0, 1.0]]]]))[0, 0, 0, 0].item(), 6)
    0.5
    """
    centred = x.double() - x.double().mean(dim=(2, 3), keepdim=True)  # squares cancel less

    def mean(image: Tensor) -> Tensor:
        return F.avg_pool2d(image, kernel_size=3, stride=1, padding=1, count_include_pad=False)

    return (mean(centred.square()) - mean(centred).square()).clamp_min(0).sqrt()


@dataclass(frozen=True)
class WeightedLp(Threat):
    """All images within `eps` of the clean one in the weighted norm, and within the image bounds.

    Attributes:
        norm: "linf", "l2" or "l1".
        eps: the radius, in local standard deviations (l1: their sum over the image); a number, text such as "1/2", or
            None for minimum-norm attacks.
        bounds: smallest and largest value of an image.
        floor: the smallest deviation that counts, in the units of the images: what a flat region is taken for.

    Raises:
        ValueError: unknown norm, a negative radius, a floor that is not above 0, or bounds in the wrong order.
    """

    norm: str
    eps: float | str | None
    bounds: tuple[float, float] = (0.0, 1.0)
    floor: float | str = 1 / 255
    _weights: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        lookup(str(self.norm), {name: NORMS[name] for name in WEIGHTED}, "weighted norm")
        object.__setattr__(self, "bounds", ordered_bounds(self.bounds))
        object.__setattr__(self, "floor", parse_number(self.floor))
        if self.eps is not None:
            object.__setattr__(self, "eps", parse_number(self.eps))
            if not parse_number(self.eps) >= 0:
                raise ValueError(f"eps must be >= 0, got {self.eps}")
        if not parse_number(self.floor) > 0:
            raise ValueError(f"floor must be > 0, got {self.floor}; for one grey level of 255 write '1/255'")

    @property
    def name(self) -> str:
        """The norm, with the floor and the bounds where they are not 1/255 and [0, 1]."""
        name = f"weighted_{self.norm}" + ("" if self.floor == 1 / 255 else f"(floor={self.floor:g})")
        return name if self.bounds == (0.0, 1.0) else f"{name}[{self.bounds[0]:g},{self.bounds[1]:g}]"

    @property
    def size(self) -> float | None:
        """`eps` as a number; None where it is None."""
        return None if self.eps is None else float(self.eps)

    @property
    def _geometry(self) -> Norm:
        return NORMS[self.norm]

    def check_fits(self, x: Tensor) -> None:
        """Check that the budget leaves something out.

        Raises:
            ValueError: a radius that holds every image of the bounds, around each of `x`.
        """
        if self.eps is None or len(x) == 0:
            return
        whole = float(self._geometry.size(self.weights(x) * (self.bounds[1] - self.bounds[0])).max())
        if float(self.eps) > whole * (1 + 1e-6):
            raise ValueError(f"{self.name} eps {self.eps:g} is wider than the whole image range ({whole:g} here)")

    def around(self, x: Tensor) -> Self:
        """Return the threat with the weights of these clean images kept, for `steepest`, and so as to reckon them once.

        From then on it belongs to this batch: use `take` for a part of it.
        """
        if self._weights is not None:
            return self
        return self._with(self.weights(x))

    def take(self, keep: Tensor) -> Self:
        """Return the threat of these rows."""
        return self if self._weights is None else self._with(self._weights[keep])

    def _with(self, weights: Tensor) -> Self:
        part = copy.copy(self)
        object.__setattr__(part, "_weights", weights)
        return part

    def weights(self, x: Tensor) -> Tensor:
        """Return what a change of each entry of clean images (B, C, H, W) counts for, float64."""
        return 1 / local_deviation(x).clamp_min(float(self.floor)) if self._weights is None else self._weights

    def radius(self, x: Tensor) -> Tensor:
        """Return eps in the dtype and on the device of `x`, shape (1, 1, 1, 1).

        Raises:
            ValueError: eps is None.
        """
        if self.eps is None:
            raise ValueError("this needs a budget: give the threat an eps (None is for minimum-norm attacks)")
        return torch.as_tensor(self.eps, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1)

    def apply(self, x: Tensor, point: Tensor) -> Tensor:
        """Return the points: they are images."""
        return point

    def origin(self, x: Tensor) -> Tensor:
        """Return the clean images."""
        return x

    def distance(self, point: Tensor, x: Tensor) -> Tensor:
        """Return the weighted norm of the change, float64 (B,)."""
        return self._geometry.size(self.weights(x) * (point.double() - x.double()))

    def contains(self, point: Tensor, x: Tensor) -> Tensor:
        """Return bool (B,): finite, within bounds, and within eps where there is one."""
        rows = point.flatten(1)
        inside = ((rows >= self.bounds[0] - TOLERANCE) & (rows <= self.bounds[1] + TOLERANCE)).all(dim=1)
        if self.eps is None:
            return inside
        return inside & (self.distance(point, x) <= float(self.eps) + TOLERANCE * max(float(self.eps), 1))

    def _reach(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return eps less the room that rounding needs: x + d, rounded to the dtype of x, is then within eps.

        Each entry of x + d is off by half an ulp of the largest image value at most, and counts by its weight.
        """
        half_ulp = torch.finfo(x.dtype).eps / 2 * max(abs(bound) for bound in self.bounds)
        room = self._geometry.size(half_ulp * weights).reshape(-1, 1, 1, 1)
        return (self.radius(weights) * (1 - 1e-12) - room).clamp_min(0)

    @torch.no_grad()
    def project(self, point: Tensor, x: Tensor) -> Tensor:
        """Return the nearest points (in Euclidean distance) in ball and bounds; reckoned in float64."""
        weights, clean = self.weights(x), x.double()
        change, low, high = point.double() - clean, self.bounds[0] - clean, self.bounds[1] - clean
        reach = self._reach(x, weights)
        if self.norm == "linf":
            moved = change.clamp(-reach / weights, reach / weights).clamp(low, high)
        else:
            moved = self._shrunk(change, weights, reach, low, high)
        return (clean + moved).to(x.dtype).clamp(*self.bounds)

    def _shrunk(self, change: Tensor, weights: Tensor, reach: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Find the multiplier of the ball by bisection, and return the point it gives.

        The nearest point is clip(d / (1 + lambda w^2)) for l2 and clip(soft(d, lambda w)) for l1, with the smallest
        lambda >= 0 that keeps it in the ball: its norm falls as lambda grows. The upper end of the bracket is feasible
        from the first, so the result is feasible wherever the search stops.
        """

        def at(multiplier: Tensor) -> Tensor:
            if self.norm == "l2":
                return (change / (1 + multiplier * weights.square())).clamp(low, high)
            return (change.sign() * (change.abs() - multiplier * weights).clamp_min(0)).clamp(low, high)

        if self.norm == "l2":  # there sum w^2 d^2 <= sum (d / w)^2 / lambda^2
            top = (change / weights).square().sum(dim=(1, 2, 3), keepdim=True).sqrt() / reach.clamp_min(1e-300)
        else:
            top = (change.abs() / weights).amax(dim=(1, 2, 3), keepdim=True)
        lower, upper = torch.zeros_like(top), top
        outside = self._geometry.size(weights * at(lower)).reshape(-1, 1, 1, 1) > reach
        for _ in range(HALVINGS):
            middle = (lower + upper) / 2
            fits = self._geometry.size(weights * at(middle)).reshape(-1, 1, 1, 1) <= reach
            lower, upper = torch.where(fits, lower, middle), torch.where(fits, middle, upper)
        return torch.where(outside, torch.where(reach > 0, at(upper), 0), change.clamp(low, high))

    @torch.no_grad()
    def random_point(self, x: Tensor, streams: Streams) -> Tensor:
        """Return points uniform in the ball, cut to the bounds."""
        weights, clean = self.weights(x), x.double()
        low, high = self.bounds[0] - clean, self.bounds[1] - clean
        reach = self._reach(x, weights)
        stretched = self._geometry.random(clean, reach, low * weights, high * weights, streams)
        return (clean + stretched / weights).to(x.dtype).clamp(*self.bounds)

    def steepest(self, gradient: Tensor, density: float | None = None, at: Tensor | None = None) -> Tensor:
        """Return the maximiser of <d, gradient> over the unit ball of `around`'s images (0 where the gradient is 0).

        With u = w d it is the maximiser of <u, gradient / w> over the plain unit ball.

        Args:
            gradient: (B, C, H, W).
            density: as for `Lp`.
            at: as for `Lp`.

        Raises:
            ValueError: the weights are not known.
        """
        if self._weights is None:
            raise ValueError("the steepest direction depends on the clean images: use threat.around(x)")
        if self.norm == "l1" and at is not None:
            gradient = gradient.masked_fill(stuck(at, gradient, self.bounds), 0)
        stretched = self._geometry.steepest(gradient.double() / self._weights, density)
        return (stretched / self._weights).to(gradient.dtype)
