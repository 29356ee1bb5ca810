"""Threat models: what an adversary may do to an input. All geometry lives here and in the norms beside it."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from torch import Tensor

from robustbench_lite.core.checks import parse_number
from robustbench_lite.core.errors import lookup
from robustbench_lite.core.norms import L0_BY_COORDINATE, NORMS, Norm, stuck
from robustbench_lite.core.rng import Streams

__all__ = ["TOLERANCE", "Lp", "Projector", "Threat", "ordered_bounds"]

TOLERANCE = 1e-6  # membership is decided in float64 up to this, times eps where eps > 1


class Threat(ABC):
    """A set of inputs around each clean image, walked through by *points*.

    A point is what an attack searches over: the image itself for an Lp ball, the parameters of a transformation for a
    parametric threat. `apply` turns points into images.
    """

    bounds: tuple[float, float]
    parametric: bool = False

    @property
    @abstractmethod
    def name(self) -> str:
        """The name in tables, such as "linf"."""

    @property
    @abstractmethod
    def size(self) -> float | None:
        """The budget as one number; None for a minimum-norm threat, NaN for one budget a sample."""

    def resized(self, size: float | str) -> Self:
        """Return the threat with another budget, in the unit of `size`: a number, or text such as "8/255".

        Raises:
            ValueError: a threat without an `eps`, or a budget out of range.
        """
        if not hasattr(self, "eps"):
            raise ValueError(f"{self!r} has one budget only: override `resized` for others")
        return replace(cast(Any, self), eps=size)  # type: ignore[no-any-return]

    def check_fits(self, x: Tensor) -> None:  # noqa: B027  (most budgets fit all images)
        """Check that the budget makes sense for images `x` (B, C, H, W).

        Raises:
            ValueError: it does not.
        """

    @abstractmethod
    def take(self, keep: Tensor) -> Self:
        """Return the threat of these rows (it differs where the budget is given for each sample)."""

    def around(self, x: Tensor) -> Self:
        """Return this threat with what it has to reckon once about the clean images `x`; an attack begins with it."""
        return self

    @abstractmethod
    def apply(self, x: Tensor, point: Tensor) -> Tensor:
        """Return the images (B, C, H, W) that points stand for."""

    @abstractmethod
    def origin(self, x: Tensor) -> Tensor:
        """Return the points that stand for the clean images."""

    @abstractmethod
    def distance(self, point: Tensor, x: Tensor) -> Tensor:
        """Return the size of the change, float64 (B,)."""

    @abstractmethod
    def contains(self, point: Tensor, x: Tensor) -> Tensor:
        """Return bool (B,): the point is finite and within budget and bounds, judged in float64."""

    @abstractmethod
    def project(self, point: Tensor, x: Tensor) -> Tensor:
        """Return nearby points inside the threat."""

    def projector(self, x: Tensor) -> Projector:
        """Return `project` for these images, for a search that projects again and again."""
        return Projector(self, x)

    @abstractmethod
    def random_point(self, x: Tensor, streams: Streams) -> Tensor:
        """Return one random point of the threat for each image."""


def ordered_bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    """Return (low, high) as numbers.

    Raises:
        ValueError: not two finite numbers in this order.
    """
    pair = tuple(bounds) if isinstance(bounds, Iterable) and not isinstance(bounds, str) else (bounds,)
    if len(pair) != 2 or not parse_number(pair[0]) < parse_number(pair[1]):
        raise ValueError(f"bounds must be (low, high) with low < high, got {bounds}")
    return parse_number(pair[0]), parse_number(pair[1])


class Projector:
    """The projection of points (n, ...) around fixed images, for a search that repeats it."""

    def __init__(self, threat: Threat, x: Tensor) -> None:
        self._threat, self._x = threat, x

    def __call__(self, point: Tensor) -> Tensor:
        """Return nearby points inside the threat."""
        return self._threat.project(point, self._x)

    def take(self, keep: Tensor) -> Projector:
        """Return the projector of these rows, int64 positions."""
        return Projector(self._threat.take(keep), self._x.index_select(0, keep))


class _Walls(Projector):
    """The projection on a box."""

    def __init__(self, low: Tensor, high: Tensor) -> None:
        self._low, self._high = low, high

    def __call__(self, point: Tensor) -> Tensor:
        return point.detach().clamp(self._low, self._high)

    def take(self, keep: Tensor) -> Projector:
        return _Walls(self._low.index_select(0, keep), self._high.index_select(0, keep))


@dataclass(frozen=True)
class Lp(Threat):
    """All images within `eps` of the clean one in an Lp norm, and within the image bounds.

    Attributes:
        norm: "linf", "l2", "l1" or "l0".
        eps: the radius, in the units of the images: a number, text such as "8/255", a tensor (B,) with one radius a
            sample, or None for minimum-norm attacks ("as small as possible").
        bounds: smallest and largest value of an image.
        per: what l0 counts: "pixel" (a pixel has moved when any channel has) or "coordinate".

    Raises:
        ValueError: unknown norm, a radius that is negative or not finite, bounds in the wrong order, or a radius
            wider than the image range (pixel units by mistake).
    """

    norm: str
    eps: float | str | Tensor | None
    bounds: tuple[float, float] = (0.0, 1.0)
    per: str = "pixel"

    def __post_init__(self) -> None:
        lookup(str(self.norm), NORMS, "norm")
        if self.per not in ("pixel", "coordinate") or (self.per == "coordinate" and self.norm != "l0"):
            raise ValueError(f"per is 'pixel', or for l0 'coordinate', got {self.per!r} with {self.norm}")
        object.__setattr__(self, "bounds", ordered_bounds(self.bounds))
        if self.eps is not None and not isinstance(self.eps, Tensor):
            object.__setattr__(self, "eps", parse_number(self.eps))
        self._check_eps()

    def _check_eps(self) -> None:
        if self.eps is None:
            return
        eps = self.eps if isinstance(self.eps, Tensor) else torch.tensor([self.eps], dtype=torch.float64)
        if eps.ndim != 1:
            raise ValueError(f"eps must be a number or a tensor (B,), got shape {tuple(eps.shape)}")
        if not bool(((eps >= 0) & eps.isfinite()).all()):
            raise ValueError(f"eps must be >= 0 and finite, got {self.eps}; for pixel units write '8/255'")
        span = self.bounds[1] - self.bounds[0]
        if self.norm == "linf" and bool((eps > span * (1 + 1e-9)).any()):
            raise ValueError(
                f"linf eps must be at most the image range {span:g}, got {self.eps}; for pixel units write '8/255'"
            )

    @property
    def name(self) -> str:
        """The norm, with what l0 counts and the bounds where they are not pixels and [0, 1]."""
        norm = self.norm if self.per == "pixel" else f"{self.norm}_{self.per}"
        return norm if self.bounds == (0.0, 1.0) else f"{norm}[{self.bounds[0]:g},{self.bounds[1]:g}]"

    @property
    def size(self) -> float | None:
        """`eps` as a number; None where it is None, NaN where it is a tensor."""
        return math.nan if isinstance(self.eps, Tensor) else None if self.eps is None else float(self.eps)

    @property
    def _geometry(self) -> Norm:
        return NORMS[self.norm] if self.per == "pixel" else L0_BY_COORDINATE

    @property
    def dual_norm(self) -> str:
        """The name of the dual norm, 1/p + 1/q = 1.

        Raises:
            ValueError: l0 is no norm and has none.
        """
        if self.norm == "l0":
            raise ValueError("l0 has no dual norm")
        return self._geometry.dual

    def take(self, keep: Tensor) -> Self:
        """Return the threat of these rows."""
        if not isinstance(self.eps, Tensor):
            return self
        part = copy.copy(self)  # not `replace`, which would check the values again, at the price of a host sync
        object.__setattr__(part, "eps", self.eps[keep.to(self.eps.device)])
        return part

    def radius(self, x: Tensor) -> Tensor:
        """Return eps in the dtype and on the device of `x`, broadcastable: (B, 1, 1, 1) or (1, 1, 1, 1).

        Raises:
            ValueError: eps is None, or a tensor that does not have one value for each image.
        """
        if self.eps is None:
            raise ValueError("this needs a budget: give the threat an eps (None is for minimum-norm attacks)")
        if isinstance(self.eps, Tensor) and len(self.eps) != len(x):
            raise ValueError(f"eps must have one value for each of the {len(x)} images, got {len(self.eps)}")
        return torch.as_tensor(self.eps, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1)

    def check_fits(self, x: Tensor) -> None:
        """Check that there is one eps for each image, and none wider than the image range.

        Raises:
            ValueError: another number of values, or a radius that holds every image (pixel units by mistake).
        """
        if self.eps is None or len(x) == 0:
            return
        widest, count = float(self.radius(x).max()), x.shape[1:].numel()
        span, pixels = self.bounds[1] - self.bounds[0], count // (x.shape[1] if self.per == "pixel" else 1)
        whole = {"linf": span, "l2": span * math.sqrt(count), "l1": span * count, "l0": float(pixels)}[self.norm]
        if widest > whole * (1 + 1e-6):
            raise ValueError(
                f"{self.norm} eps {widest:g} is wider than the whole image range ({whole:g} for these images); "
                "for pixel units divide by 255"
            )

    def _reach(self, x: Tensor) -> Tensor:
        """Return eps less the room that rounding needs, so that x + d, rounded, is within eps in real arithmetic.

        Each entry of x + d is rounded by at most half an ulp of the largest image value; l2 and l1 add these up, and
        their own sums are rounded as well.
        """
        ulp, count = torch.finfo(x.dtype).eps, x.shape[1:].numel()
        entries = {"linf": 1.0, "l2": math.sqrt(count), "l1": float(count), "l0": 0.0}[self.norm]
        sums = {"linf": 1.0, "l2": 8.0, "l1": 8.0, "l0": 0.0}[self.norm]
        room = entries * ulp / 2 * max(abs(bound) for bound in self.bounds)
        return (self.radius(x) * (1 - sums * ulp) - room).clamp_min(0)

    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest axis-aligned box (lower, upper) that holds the threat: every norm is at least linf's."""
        reach = torch.full_like(x, self.bounds[1] - self.bounds[0]) if self.norm == "l0" else self.radius(x)
        if self.norm == "l0":
            reach = torch.where(self.radius(x) >= 1, reach, 0)
        return (x - reach).clamp(*self.bounds), (x + reach).clamp(*self.bounds)

    def apply(self, x: Tensor, point: Tensor) -> Tensor:
        """Return the points: they are images."""
        return point

    def origin(self, x: Tensor) -> Tensor:
        """Return the clean images."""
        return x

    def distance(self, point: Tensor, x: Tensor) -> Tensor:
        """Return the norm of the change, float64 (B,)."""
        return self._geometry.size(point.double() - x.double())

    def contains(self, point: Tensor, x: Tensor) -> Tensor:
        """Return bool (B,): finite, within bounds, and within eps where there is one."""
        sure = self._surely_contains(point, x) if self.norm == "linf" and x.device.type == "cpu" else None
        if sure is not None:
            return sure
        rows = point.flatten(1)
        least, most = rows.amin(dim=1).double(), rows.amax(dim=1).double()
        inside = (least >= self.bounds[0] - TOLERANCE) & (most <= self.bounds[1] + TOLERANCE)
        if self.eps is None:
            return inside
        eps = self.radius(x.double()).reshape(-1)
        return inside & (self.distance(point, x) <= eps + TOLERANCE * eps.clamp_min(1))

    def _surely_contains(self, point: Tensor, x: Tensor) -> Tensor | None:
        """Say which points lie in an linf ball, bool (B,); None where rounding in their own precision leaves it open.

        In two steps, as most batches lie inside as a whole.
        """
        slack = TOLERANCE / 2 - torch.finfo(x.dtype).eps * max(abs(bound) for bound in self.bounds)
        if not isinstance(self.eps, float) or slack <= 0 or len(x) == 0:
            return None
        moved = point - x
        (least, most), (low, high) = ((v.item() for v in torch.aminmax(t)) for t in (moved, point))
        if not (self.bounds[0] - slack <= low and high <= self.bounds[1] + slack):
            return None
        if max(-least, most) <= self.eps + slack:
            return torch.ones(len(x), dtype=torch.bool)
        far = moved.flatten(1).abs_().amax(dim=1)
        near = far <= self.eps + slack
        beyond = far > self.eps + 2 * TOLERANCE * max(self.eps, 1)  # by more than rounding can be off
        return near if bool((near | beyond).all()) else None

    @torch.no_grad()
    def project(self, point: Tensor, x: Tensor) -> Tensor:
        """Return the nearest points (in Euclidean distance) in ball and bounds.

        Runs under `no_grad`: a gradient through `clamp` is 0 at the bound since torch 2.15, which would silently mask
        gradients on black and white pixels.
        """
        reach = self._reach(x)
        moved = self._geometry.project(point - x, reach, self.bounds[0] - x, self.bounds[1] - x)
        return (x + moved).clamp(*self.bounds)

    def projector(self, x: Tensor) -> Projector:
        """Return `project` for these images: linf finds its walls once, and then makes one pass over the points."""
        if self.norm != "linf":
            return super().projector(x)
        reach = self._reach(x)
        return _Walls((x - reach).clamp(*self.bounds), (x + reach).clamp(*self.bounds))

    @torch.no_grad()
    def random_point(self, x: Tensor, streams: Streams) -> Tensor:
        """Return points uniform in the ball (l0: uniform values on floor(eps) uniform pixels), cut to the bounds."""
        low, high = self.bounds[0] - x, self.bounds[1] - x
        moved = self._geometry.random(x, self._reach(x), low, high, streams)
        return (x + moved).clamp(*self.bounds)

    def steepest(self, gradient: Tensor, density: float | None = None, at: Tensor | None = None) -> Tensor:
        """Return the maximiser of <d, gradient> over the unit ball (0 where the gradient is 0).

        Args:
            gradient: (B, C, H, W).
            density: for l1, spread the step evenly over this share of the largest entries; None: the true maximiser,
                a single entry.
            at: the images (B, C, H, W) to step from; given, l1 passes over entries at a bound that point out of it
                (they could not move, and would use the step up).
        """
        if self.norm == "l1" and at is not None:
            gradient = gradient.masked_fill(stuck(at, gradient, self.bounds), 0)
        return self._geometry.steepest(gradient, density)
