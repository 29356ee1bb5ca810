"""Randomized ablation, against l0."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbench_lite.certify._corruptions import Corruption, RandomPixels
from robustbench_lite.certify._vote_checks import check_count
from robustbench_lite.certify.majority_certifier import MajorityCertifier
from robustbench_lite.core.models import Model

__all__ = ["RandomizedAblation"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class RandomizedAblation(MajorityCertifier):
    """Votes on copies of which only k random pixels are left; the l0 radius counts pixels.

    An attack on r of d pixels is not seen by a copy that keeps none of them, so a class's probability changes by at
    most delta(r) = 1 - C(d - r, k) / C(d, k). The radius is the largest r with pA > 1/2 + delta(r), by exact rational
    arithmetic. A bound on changed coordinates (`per="coordinate"`) holds as well: they lie in no more pixels.

    The base model sees images of 2 C channels, v - low and high - v for a pixel value v of the range [low, high], and
    zero in both where a pixel is ablated; it has to be trained on such images.

    Source: Levine, Feizi, "Robustness Certificates for Sparse Adversarial Attacks by Randomized Ablation", AAAI 2020,
    arXiv:1911.09272.
    Departures: votes, bounds and stopping as in `RandomizedSmoothing` (the paper has n0 = 1,000, n = 10,000, alpha =
    0.05).

    Attributes:
        k: pixels that are kept.

    Raises:
        ValueError: k below 1, or at the call more pixels than an image has.
    """

    norms: ClassVar[tuple[str, ...]] = ("l0",)
    k: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("k", self.k, "pixels that are kept")

    @property
    def source(self) -> tuple[object, ...]:
        """Ablation, and what it keeps."""
        return ("ablation", self.k)

    def corruption(self, model: Model, x: Tensor, bounds: tuple[float, float]) -> Corruption:
        """Return the ablation of all but k pixels."""
        if self.k > x[0, 0].numel():
            raise ValueError(f"k = {self.k} pixels cannot be kept of images of {x[0, 0].numel()} pixels")
        return RandomPixels(self.k, bounds)

    def radii(self, p: Array, norm: str, shape: torch.Size) -> Array:
        """Return the numbers of pixels, as floats."""
        needed = _needed(shape[1:].numel(), self.k)
        return np.where(p > 0.5, np.searchsorted(needed, p, side="left") - 1.0, np.nan)

    def needed(self, eps: Array, norm: str, shape: torch.Size) -> Array:
        """Return 1/2 + delta(eps); 1, which is out of reach, where no number of votes is enough."""
        needed = np.append(_needed(shape[1:].numel(), self.k), 1.0)
        return needed[np.minimum(np.floor(eps), len(needed) - 1).astype(np.int64)]


@cache
def _needed(pixels: int, k: int) -> Array:
    """Return 1/2 + delta(r), rounded up, for r = 0, 1, ... while it is below 1."""
    found: list[float] = []
    missed, r = Fraction(1), 0  # the probability that all r pixels are ablated
    while missed > Fraction(1, 2):
        exact = Fraction(3, 2) - missed
        nearest = float(exact)
        found.append(nearest if Fraction(nearest) >= exact else float(np.nextafter(nearest, 2)))
        missed *= Fraction(max(pixels - k - r, 0), pixels - r)
        r += 1
    return np.array(found)
