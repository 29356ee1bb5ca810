"""Bases of the image space: the part that turns a search over pixels into one over low frequencies or tiles.

An attack draws or keeps *coefficients*, and decodes them to images. Each basis is orthonormal: a standard normal draw
stays one on its span, `encode` is the transpose of `decode`, and decoding an encoded image projects it on the span.
Source: Guo, Frank and Weinberger 2018, "Low Frequency Adversarial Perturbation" (1809.08758) for the DCT block.
Departure: the kept block has ceil(fraction * side) frequencies along each axis, so that no fraction keeps none.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["DCT", "Basis", "Pixels", "Tiles"]

Shape = Sequence[int]


class Basis(ABC):
    """An orthonormal basis of a subspace of the images (C, H, W), the same for each channel."""

    @abstractmethod
    def axis(self, side: int) -> Tensor:
        """Return the basis along one axis of `side` pixels: float64 (k, side) with orthonormal rows."""

    def size(self, shape: Shape) -> int:
        """Return the number of coefficients of an image of `shape` (C, H, W)."""
        channels, height, width = shape
        return channels * len(self.axis(height)) * len(self.axis(width))

    def decode(self, coefficients: Tensor, shape: Shape) -> Tensor:
        """Return the images (..., C, H, W) of coefficients (..., m), channel by channel, rows before columns."""
        rows, columns = self._axes(shape, coefficients)
        block = coefficients.reshape(*coefficients.shape[:-1], shape[0], len(rows), len(columns))
        return rows.mT @ block @ columns

    def encode(self, images: Tensor) -> Tensor:
        """Return the coefficients (..., m) of images (..., C, H, W): the transpose of `decode`."""
        rows, columns = self._axes(images.shape[-3:], images)
        return (rows @ images @ columns.mT).flatten(-3)

    def project(self, images: Tensor) -> Tensor:
        """Return the orthogonal projection of images (..., C, H, W) on the span."""
        return self.decode(self.encode(images), images.shape[-3:])

    def _axes(self, shape: Shape, like: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(_on_device(self, side, like.dtype, like.device) for side in shape[-2:])  # type: ignore[return-value]


@lru_cache(maxsize=64)
def _on_device(basis: Basis, side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept for later calls, which may want gradients
        return basis.axis(side).to(device, dtype)


@dataclass(frozen=True)
class Pixels(Basis):
    """Every pixel by itself: the whole image space."""

    def axis(self, side: int) -> Tensor:
        """Return the identity."""
        return torch.eye(side, dtype=torch.float64)

    def size(self, shape: Shape) -> int:
        """Return the number of entries of an image."""
        return math.prod(shape)

    def decode(self, coefficients: Tensor, shape: Shape) -> Tensor:
        """Return the coefficients as images."""
        return coefficients.reshape(*coefficients.shape[:-1], *shape)

    def encode(self, images: Tensor) -> Tensor:
        """Return the images as coefficients."""
        return images.flatten(-3)

    def project(self, images: Tensor) -> Tensor:
        """Return the images themselves."""
        return images


@dataclass(frozen=True)
class DCT(Basis):
    """The lowest frequencies of the orthonormal two-dimensional DCT-II of each channel.

    Attributes:
        fraction: the share of the frequencies that is kept along each axis; 1 keeps all.

    Raises:
        ValueError: a fraction outside (0, 1].
    """

    fraction: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction}")

    def axis(self, side: int) -> Tensor:
        """Return the lowest ceil(fraction * side) cosines."""
        frequency = torch.arange(math.ceil(self.fraction * side - 1e-9), dtype=torch.float64).unsqueeze(1)
        place = torch.arange(side, dtype=torch.float64) + 0.5
        waves = torch.cos(math.pi / side * frequency * place) * math.sqrt(2 / side)
        waves[0] /= math.sqrt(2)
        return waves


@dataclass(frozen=True)
class Tiles(Basis):
    """Square tiles of equal value, those at the right and lower edge cut to the image.

    Attributes:
        side: pixels along the side of a tile.

    Raises:
        ValueError: a side below 1.
    """

    side: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.side, int) or self.side < 1:
            raise ValueError(f"side must be a whole number of pixels, at least 1, got {self.side!r}")

    def axis(self, side: int) -> Tensor:
        """Return the normalised indicators of the tiles."""
        owner = torch.arange(side) // self.side
        tiles = torch.nn.functional.one_hot(owner).T.double()
        return tiles / tiles.sum(dim=1, keepdim=True).sqrt()
