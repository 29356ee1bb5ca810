"""Parametric threats: rotations with translations, and bounded smooth deformations.

Points are parameters. An image of the threat is rendered from them by bilinear sampling; coordinates are in pixels,
x to the right and y down, so pixel (i, j) has its centre at x = j, y = i.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
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
    def coordinates(self, x: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
        """Return where each output pixel reads the image: columns and rows in pixels, each (B, H, W)."""

    @abstractmethod
    def padding(self) -> str:
        """Return what lies outside the image, by `grid_sample`'s names."""

    def apply(self, x: Tensor, point: Tensor) -> Tensor:
        """Return the images (B, C, H, W) rendered from `point`; differentiable in both."""
        height, width = x.shape[-2:]
        columns, rows = self.coordinates(x, point)
        grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], dim=-1)
        low = self.bounds[0]  # "zeros" means the darkest value
        out = F.grid_sample(x - low, grid, mode="bilinear", padding_mode=self.padding(), align_corners=False) + low
        # Rounding may leave the bounds by an ulp. Clip the value, not the gradient.
        return out + (out.clamp(*self.bounds) - out).detach()


def _pixel_grid(x: Tensor) -> tuple[Tensor, Tensor]:
    height, width = x.shape[-2:]
    rows = torch.arange(height, dtype=x.dtype, device=x.device)
    columns = torch.arange(width, dtype=x.dtype, device=x.device)
    return columns.expand(height, width), rows.unsqueeze(1).expand(height, width)


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

    def padding(self) -> str:
        """Return "zeros": black comes in from outside."""
        return "zeros"

    def coordinates(self, x: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
        """Return where each pixel reads: the inverse shift, then the inverse rotation about the centre."""
        columns, rows = _pixel_grid(x)
        centre_x, centre_y = (x.shape[-1] - 1) / 2, (x.shape[-2] - 1) / 2
        angle, right, down = (v.reshape(-1, 1, 1) for v in point.unbind(dim=1))
        cos, sin = torch.cos(torch.deg2rad(angle)), torch.sin(torch.deg2rad(angle))
        dx, dy = columns - centre_x - right, rows - centre_y - down
        return centre_x + cos * dx - sin * dy, centre_y + sin * dx + cos * dy

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
        pixels: largest displacement.
        smoothness: standard deviation of the Gaussian in pixels; 0 leaves each pixel free.
        bounds: smallest and largest value of an image.

    Raises:
        ValueError: a negative or non-finite budget or smoothness.
    """

    pixels: float
    smoothness: float = 1.0
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pixels", _budget(self.pixels, "pixels"))
        object.__setattr__(self, "smoothness", _budget(self.smoothness, "smoothness"))
        object.__setattr__(self, "bounds", ordered_bounds(self.bounds))

    @property
    def name(self) -> str:
        """The name in tables, with the smoothness."""
        return f"deformation(sigma={self.smoothness:g})"

    @property
    def size(self) -> float | None:
        """The largest displacement in pixels."""
        return self.pixels

    def padding(self) -> str:
        """Return "border": the edge repeats."""
        return "border"

    def flow(self, point: Tensor) -> Tensor:
        """Return the displacements (B, 2, H, W): the raw field, smoothed (zeros beyond the border)."""
        if self.smoothness == 0:
            return point
        reach = max(1, math.ceil(3 * self.smoothness))
        steps = torch.arange(-reach, reach + 1, dtype=point.dtype, device=point.device)
        kernel = torch.exp(-0.5 * (steps / self.smoothness) ** 2)
        kernel = (kernel / kernel.sum()).reshape(1, 1, -1, 1)
        flat = point.reshape(-1, 1, *point.shape[-2:])
        flat = F.conv2d(F.conv2d(flat, kernel, padding=(reach, 0)), kernel.mT, padding=(0, reach))
        return flat.reshape(point.shape)

    def coordinates(self, x: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
        """Return where each pixel reads: its own place plus the flow."""
        columns, rows = _pixel_grid(x)
        right, down = self.flow(point).unbind(dim=1)
        return columns + right, rows + down

    def origin(self, x: Tensor) -> Tensor:
        """Return the field of no change, zeros (B, 2, H, W)."""
        return x.new_zeros(len(x), 2, *x.shape[-2:])

    def distance(self, point: Tensor, x: Tensor) -> Tensor:
        """Return the largest displacement in pixels, float64 (B,)."""
        lengths: Tensor = self.flow(point.double()).norm(dim=1)
        return lengths.flatten(1).amax(dim=1)

    def contains(self, point: Tensor, x: Tensor) -> Tensor:
        """Return bool (B,): the field is finite and no displacement exceeds the budget."""
        return self.distance(point, x) <= self.pixels + TOLERANCE * max(1.0, self.pixels)

    @torch.no_grad()
    def project(self, point: Tensor, x: Tensor) -> Tensor:
        """Return the raw field with each vector shortened to the budget."""
        length: Tensor = point.norm(dim=1, keepdim=True)
        shorter: Tensor = point * (self.pixels / length.clamp_min(1e-30)).clamp_max(1)
        return shorter

    @torch.no_grad()
    def random_point(self, x: Tensor, streams: Streams) -> Tensor:
        """Return raw fields whose vectors are independent and uniform in the disc of the budget."""
        shape = x.shape[-2:]
        radius = self.pixels * streams.uniform(*shape, dtype=x.dtype).sqrt()
        angle = 2 * math.pi * streams.uniform(*shape, dtype=x.dtype)
        return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
