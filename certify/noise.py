"""Smoothing noise: how each distribution is drawn, and what radius a vote under it proves."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from torch import Tensor

__all__ = ["GaussianNoise", "LaplaceNoise", "Noise", "UniformNoise"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Noise(ABC):
    """Noise that is independent and alike in every coordinate.

    Let the base classifier answer a class with probability p at x under this noise. `radius(p)` is the largest r so
    that the class keeps a probability above 1/2 at every x' nearer than r in `norm`; it is 0 at p = 1/2, and no
    larger one follows from p alone.

    Attributes:
        norm: the norm in which the noise certifies.

    Raises:
        ValueError: a parameter that is not positive and finite.
    """

    norm: ClassVar[str]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < math.inf:
                raise ValueError(f"{field.name} must be > 0 and finite, got {value}; in the units of the images")

    @abstractmethod
    def fill_(self, slots: Tensor, generator: torch.Generator) -> None:
        """Overwrite `slots`, a floating-point tensor of any shape, with draws."""

    @abstractmethod
    def radius(self, p: Array) -> Array:
        """Return the radii (...) that lower bounds `p` (...) on the top class's probability prove; NaN below 1/2."""

    @abstractmethod
    def probability(self, radius: Array) -> Array:
        """Return the probabilities (...) whose radii these are: the inverse of `radius`."""


@dataclass(frozen=True)
class GaussianNoise(Noise):
    """Normal noise of standard deviation `sigma`: l2 radius sigma * Phi^-1(p).

    Source: Cohen, Rosenfeld, Kolter, "Certified Adversarial Robustness via Randomized Smoothing", ICML 2019,
    arXiv:1902.02918, Theorem 1.
    """

    norm: ClassVar[str] = "l2"
    sigma: float

    def fill_(self, slots: Tensor, generator: torch.Generator) -> None:
        """Overwrite `slots` with draws."""
        slots.normal_(0.0, self.sigma, generator=generator)

    def radius(self, p: Array) -> Array:
        """Return the l2 radii."""
        return np.where(p >= 0.5, self.sigma * ndtri(p), np.nan)

    def probability(self, radius: Array) -> Array:
        """Return the inverse of `radius`."""
        return np.asarray(ndtr(np.asarray(radius) / self.sigma))


@dataclass(frozen=True)
class UniformNoise(Noise):
    """Uniform noise on [-half_width, half_width]: l1 radius 2 * half_width * (p - 1/2).

    Two cubes shifted by d overlap in a share of prod(1 - |d_i| / (2 half_width)) >= 1 - |d|_1 / (2 half_width), so p
    falls by at most |d|_1 / (2 half_width).

    Source: Yang, Duan, Hu, Salman, Razenshteyn, Li, "Randomized Smoothing of All Shapes and Sizes", ICML 2020,
    arXiv:2002.08118; Lee, Yuan, Chang, Jaakkola, NeurIPS 2019, arXiv:1906.04948.
    """

    norm: ClassVar[str] = "l1"
    half_width: float

    def fill_(self, slots: Tensor, generator: torch.Generator) -> None:
        """Overwrite `slots` with draws."""
        slots.uniform_(-self.half_width, self.half_width, generator=generator)

    def radius(self, p: Array) -> Array:
        """Return the l1 radii."""
        return np.where(p >= 0.5, 2 * self.half_width * (p - 0.5), np.nan)

    def probability(self, radius: Array) -> Array:
        """Return the inverse of `radius`."""
        return 0.5 + np.asarray(radius) / (2 * self.half_width)


@dataclass(frozen=True)
class LaplaceNoise(Noise):
    """Laplace noise of scale b (standard deviation sqrt(2) b): l1 radius -b * log(2 (1 - p)).

    Along a path of unit l1 speed the probability 1 - p of all other classes grows by at most (1 - p) / b, because the
    log-density changes by at most 1 / b; it reaches 1/2 after b * log(1 / (2 (1 - p))).

    Source: Teng, Lee, Yuan, "l1 Adversarial Robustness Certificates: a Randomized Smoothing Approach", 2019; Yang et
    al. 2020, arXiv:2002.08118.
    """

    norm: ClassVar[str] = "l1"
    scale: float

    def fill_(self, slots: Tensor, generator: torch.Generator) -> None:
        """Overwrite `slots` with draws: the difference of two exponential ones."""
        slots.exponential_(1 / self.scale, generator=generator)
        slots -= torch.empty_like(slots).exponential_(1 / self.scale, generator=generator)

    def radius(self, p: Array) -> Array:
        """Return the l1 radii."""
        with np.errstate(divide="ignore"):
            return np.where(p >= 0.5, -self.scale * np.log(2 * (1 - np.asarray(p))), np.nan)

    def probability(self, radius: Array) -> Array:
        """Return the inverse of `radius`."""
        return 1 - np.exp(-np.asarray(radius) / self.scale) / 2
