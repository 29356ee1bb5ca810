"""Parametric threats: rotations with translations, and bounded smooth deformations.

Points are parameters. An image of the threat is rendered from them by bilinear sampling; coordinates are in pixels,
x to the right and y down, so pixel (i, j) has its centre at x = j, y = i.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_lite.core.checks import parse_number
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import TOLERANCE, Threat, ordered_bounds

__all__ = ["Deformation", "ParametricThreat", "RotationTranslation"]


class ParametricThreat(Threat):
    """A threat whose points are parameters; membership is decided on them, never on the image."""

    parametric = True

    def take(self, keep: Tensor) -> Self:
        """Return this threat: its budget is the same for each sample."""
        return self

    @abstractmethod
    def grid(self, x: Tensor, point: Tensor) -> Tensor:
        """Return where each output pixel reads the image: its column and its row, (B, 2, H, W).

        Units are `grid_sample`'s without aligned corners: -1 and 1 are the outer edges of the image. Pixel j of W has
        its centre at (2 j + 1) / W - 1, and one pixel is 2 / W wide.
        """

    @abstractmethod
    def steepest(self, gradient: Tensor, x: Tensor) -> Tensor:
        """Return the maximiser of <d, gradient> over the whole threat (0 where the gradient is 0)."""

    @abstractmethod
    def padding(self) -> str:
        """Return what lies outside the image, by `grid_sample`'s names."""

    def apply(self, x: Tensor, point: Tensor) -> Tensor:
        """Return the images (B, C, H, W) rendered from `point`; differentiable in both."""
        dark = self.bounds[0] if self.padding() == "zeros" else 0.0  # "zeros" means the darkest value
        grid = self.grid(x, point).nan_to_num(2.0, 2.0, -2.0)  # torch crashes on NaN; `contains` refuses such points
        out = F.grid_sample(
            x - dark if dark else x,
            grid.permute(0, 2, 3, 1),
            mode="bilinear",
            padding_mode=self.padding(),
            align_corners=False,
        )
        out = out + dark if dark else out
        # Rounding may leave the bounds by an ulp. Clip the value, not the gradient.
        return out + (out.clamp(*self.bounds) - out).detach() if out.requires_grad else out.clamp_(*self.bounds)


def _from_centre(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the offsets of columns (W,) and rows (H,) from the image centre, in pixels."""
    rows, columns = (torch.arange(n, dtype=x.dtype, device=x.device) - (n - 1) / 2 for n in x.shape[-2:])
    return columns, rows


def _pixel_size(x: Tensor) -> Tensor:
    """Return the width and the height of a pixel in units of the grid, (2, 1, 1)."""
    return x.new_tensor([2 / x.shape[-1], 2 / x.shape[-2]]).reshape(2, 1, 1)


@lru_cache(maxsize=16)
def _smoother(length: int, smoothness: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the Gaussian as a matrix (length, length): on small images two products beat two convolutions 4 to 1."""
    reach = max(1, math.ceil(3 * smoothness))
    with torch.inference_mode(False):  # an inference tensor could not be used in a graph later
        place = torch.arange(length, device=device)
        apart = (place - place.unsqueeze(1)).abs()
        taps = torch.exp(-0.5 * (torch.arange(reach + 1, dtype=dtype, device=device) / smoothness) ** 2)
        return torch.where(apart <= reach, taps[apart.clamp_max(reach)], 0) / (2 * taps.sum() - taps[0])


def _budget(value: float | str, what: str) -> float:
    number = parse_number(value)
    if number < 0:
        raise ValueError(f"{what} must be >= 0, got {value}")
    return number


@dataclass(frozen=True)
class RotationTranslation(ParametricThreat):
    """Rotation about the image centre, then a shift; what comes in from outside is black.

    Points are (B, 3): the angle in degrees (counter-clockwise), the shift to the right and the shift down in pixels.
    The distance is the largest of the three, each as a share of its budget: 1 at the edge of the threat. Engstrom,
    Tran, Tsipras, Schmidt and Madry 2017 (1712.02779), whose budget is 30 degrees and 3 pixels.

    Attributes:
        degrees: largest angle either way.
        pixels: largest shift either way along each axis.
        bounds: smallest and largest value of an image.

    Raises:
        ValueError: a negative or non-finite budget.
    """

    degrees: float = 30.0
    pixels: float = 3.0
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "degrees", _budget(self.degrees, "degrees"))
        object.__setattr__(self, "pixels", _budget(self.pixels, "pixels"))
        object.__setattr__(self, "bounds", ordered_bounds(self.bounds))

    @property
    def name(self) -> str:
        """The name in tables, with the budget."""
        return f"rotation_translation({self.degrees:g}deg,{self.pixels:g}px)"

    @property
    def size(self) -> float | None:
        """1: distances are shares of the budget."""
        return 1.0

    def resized(self, size: float | str) -> Self:
        """Return the threat with this multiple of both its budgets, whose `size` is 1 again."""
        share = parse_number(size)
        return replace(self, degrees=share * self.degrees, pixels=share * self.pixels)

    def padding(self) -> str:
        """Return "zeros": black comes in from outside."""
        return "zeros"

    def grid(self, x: Tensor, point: Tensor) -> Tensor:
        """Return where each pixel reads: the inverse shift, then the inverse rotation about the centre."""
        columns, rows = _from_centre(x)
        angle, right, down = (v.reshape(-1, 1, 1, 1) for v in point.unbind(dim=1))
        cos, sin, size = torch.cos(torch.deg2rad(angle)), torch.sin(torch.deg2rad(angle)), _pixel_size(x)
        across = torch.cat([cos, sin], dim=1) * size * (columns - right)
        along = torch.cat([-sin, cos], dim=1) * size * (rows.unsqueeze(1) - down)
        return across + along

    def origin(self, x: Tensor) -> Tensor:
        """Return the parameters of no change, zeros (B, 3)."""
        return x.new_zeros(len(x), 3)

    def limits(self, x: Tensor) -> Tensor:
        """Return the budget of each parameter, (3,)."""
        return x.new_tensor([self.degrees, self.pixels, self.pixels])

    def distance(self, point: Tensor, x: Tensor) -> Tensor:
        """Return the largest share of the budget that a parameter uses, float64 (B,)."""
        used, limits = point.double().abs(), self.limits(x).double()
        return torch.where(used == 0, 0, used / limits).amax(dim=1)

    def contains(self, point: Tensor, x: Tensor) -> Tensor:
        """Return bool (B,): each parameter is finite and within its budget."""
        limits = self.limits(x).double()
        return (point.double().abs() <= limits + TOLERANCE * limits.clamp_min(1)).all(dim=1)

    def steepest(self, gradient: Tensor, x: Tensor) -> Tensor:
        """Return the corner of the budget that the gradient points to, (B, 3)."""
        return self.limits(x) * gradient.sign()

    @torch.no_grad()
    def project(self, point: Tensor, x: Tensor) -> Tensor:
        """Return the parameters, each cut to its budget."""
        return point.clamp(-self.limits(x), self.limits(x))

    @torch.no_grad()
    def random_point(self, x: Tensor, streams: Streams) -> Tensor:
        """Return parameters uniform within their budgets, (B, 3)."""
        return (2 * streams.uniform(3, dtype=x.dtype) - 1) * self.limits(x)


@dataclass(frozen=True)
class Deformation(ParametricThreat):
    """Smooth flow fields that move no pixel farther than `pixels`.

    Points are raw fields (B, 2, H, W), in pixels: output pixel s reads the image at s + flow(s), where the flow is the
    raw field smoothed by a Gaussian. The weights of the Gaussian sum to at most 1, so a raw field within the budget
    gives a flow within it. The distance is the largest displacement of the *flow*, max_s ||flow(s)||_2, the measure of
    Alaifari, Alberti and Gauksson 2018 (1804.07729). Beyond the border the image's edge repeats.

    Attributes:
        pixels: largest displacement; None for minimum-norm attacks ("as small as possible").
        smoothness: standard deviation of the Gaussian in pixels; 0 leaves each pixel free.
        bounds: smallest and largest value of an image.

    Raises:
        ValueError: a negative or non-finite budget or smoothness.
    """

    pixels: float | str | None
    smoothness: float = 1.0
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.pixels is not None:
            object.__setattr__(self, "pixels", _budget(self.pixels, "pixels"))
        object.__setattr__(self, "smoothness", _budget(self.smoothness, "smoothness"))
        object.__setattr__(self, "bounds", ordered_bounds(self.bounds))

    @property
    def name(self) -> str:
        """The name in tables, with the smoothness."""
        return f"deformation(sigma={self.smoothness:g})"

    @property
    def size(self) -> float | None:
        """The largest displacement in pixels; None where it is None."""
        return None if self.pixels is None else float(self.pixels)

    def resized(self, size: float | str) -> Self:
        """Return the threat with this largest displacement in pixels."""
        return replace(self, pixels=size)

    def padding(self) -> str:
        """Return "border": the edge repeats."""
        return "border"

    def flow(self, point: Tensor) -> Tensor:
        """Return the displacements (B, 2, H, W): the raw field, smoothed (zeros beyond the border)."""
        if self.smoothness == 0:
            return point
        down, across = (_smoother(n, self.smoothness, point.dtype, point.device) for n in point.shape[-2:])
        return down @ point @ across

    def grid(self, x: Tensor, point: Tensor) -> Tensor:
        """Return where each pixel reads: its own place plus the flow."""
        (columns, rows), size = _from_centre(x), _pixel_size(x)
        own = torch.stack(torch.meshgrid(columns, rows, indexing="xy")) * size
        return torch.addcmul(own, self.flow(point), size)

    def origin(self, x: Tensor) -> Tensor:
        """Return the field of no change, zeros (B, 2, H, W)."""
        return x.new_zeros(len(x), 2, *x.shape[-2:])

    def distance(self, point: Tensor, x: Tensor) -> Tensor:
        """Return the largest displacement in pixels, float64 (B,)."""
        lengths: Tensor = self.flow(point.double()).norm(dim=1)
        return lengths.flatten(1).amax(dim=1)

    def contains(self, point: Tensor, x: Tensor) -> Tensor:
        """Return bool (B,): the field is finite, and no displacement exceeds the budget where there is one."""
        if self.size is None:
            return self.distance(point, x).isfinite()
        return self.distance(point, x) <= self.size + TOLERANCE * max(1.0, self.size)

    def _reach(self) -> float:
        if self.size is None:
            raise ValueError("this needs a budget: give the threat its pixels (None is for minimum-norm attacks)")
        return self.size

    def steepest(self, gradient: Tensor, x: Tensor) -> Tensor:
        """Return the raw field whose vectors point along the gradient, each as long as the budget, (B, 2, H, W).

        Raises:
            ValueError: pixels is None.
        """
        length = torch.hypot(*gradient.unbind(dim=1)).unsqueeze(1)  # squares of tiny gradients would underflow
        return self._reach() * gradient / torch.where(length > 0, length, 1)

    @torch.no_grad()
    def project(self, point: Tensor, x: Tensor) -> Tensor:
        """Return the raw field with each vector shortened to the budget.

        Raises:
            ValueError: pixels is None.
        """
        length: Tensor = point.norm(dim=1, keepdim=True)
        shorter: Tensor = point * (self._reach() / length.clamp_min(1e-30)).clamp_max(1)
        return shorter

    @torch.no_grad()
    def random_point(self, x: Tensor, streams: Streams) -> Tensor:
        """Return raw fields whose vectors are independent and uniform in the disc of the budget.

        Raises:
            ValueError: pixels is None.
        """
        shape = x.shape[-2:]
        radius = self._reach() * streams.uniform(*shape, dtype=x.dtype).sqrt()
        angle = 2 * math.pi * streams.uniform(*shape, dtype=x.dtype)
        return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
