"""Gaussian smoothing with the Renyi-divergence bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from robustbench_lite.certify._corruptions import AddedNoise, Corruption
from robustbench_lite.certify._inclusion import inclusion
from robustbench_lite.certify._search import largest
from robustbench_lite.certify.noise import GaussianNoise
from robustbench_lite.certify.smoothing_certifier import ROUNDING
from robustbench_lite.certify.top_two_certifier import TopTwoCertifier
from robustbench_lite.certify.votes import Votes
from robustbench_lite.core.models import Model

__all__ = ["RenyiSmoothing"]

Array = NDArray[np.float64]

ORDERS = 1 + np.geomspace(1e-4, 1e2, 97)  # of the divergence; every order > 1 proves a radius
LOG_ROUNDING = 1e-15  # of a logarithm of a number near 1; division by 1 - order enlarges it


@dataclass(frozen=True)
class RenyiSmoothing(TopTwoCertifier):
    """Votes under Gaussian noise; the l2 radius L by the Renyi divergence of shifted Gaussians.

    With top-two probabilities p1 > p2,

        L^2 = sup_{a > 1} -(2 sigma^2 / a) log(1 - p1 - p2 + 2 ((p1^(1-a) + p2^(1-a)) / 2)^(1/(1-a))).

    Always below the radius that `RandomizedSmoothing` finds for the same p1 and p2, sigma / 2 (Phi^-1(p1) -
    Phi^-1(p2)); against its usual form with p2 = 1 - p1 it can win where the rival is far below 1 - p1. linf holds at
    L / sqrt(d) and l1 at L.

    Source: Li, Chen, Wang, Carin, "Certified Adversarial Robustness with Additive Noise", NeurIPS 2019,
    arXiv:1809.03113.
    Departures: in log space (p^(1-a) overflows near p1 = 1); a continuous search for the order, where the original
    takes 100 values up to 2; exact simultaneous bounds on p1 and p2, where the original's multinomial intervals
    (Sison and Glaz) are approximate; n0 fresh draws choose the class.

    Attributes:
        sigma: standard deviation of the noise, in the units of the images.
    """

    sigma: float

    def __post_init__(self) -> None:
        super().__post_init__()
        GaussianNoise(self.sigma)

    @property
    def source(self) -> tuple[object, ...]:
        """The noise."""
        return (GaussianNoise(self.sigma),)

    def corruption(self, model: Model, x: Tensor, bounds: tuple[float, float]) -> Corruption:
        """Return the addition of noise."""
        return AddedNoise(GaussianNoise(self.sigma))

    def radii(self, p1: Array, p2: Array, norm: str, votes: Votes) -> Array:
        """Return the radii times the inclusion of the norms."""
        factor = (1 - ROUNDING) * inclusion("l2", norm, votes.shape.numel())
        return factor * self.sigma * renyi_radius(p1, p2)


def renyi_radius(p1: Array, p2: Array) -> Array:
    """Return L / sigma (B,) for probabilities p1 > p2 > 0 (B,)."""
    first, second = np.log(p1)[:, None], np.log(p2)[:, None]
    with np.errstate(divide="ignore"):
        rest = np.log(np.maximum(1 - p1 - p2, 0))[:, None]

    def squared(order: Array) -> Array:
        power = 1 - order
        mean = (np.logaddexp(power * first, power * second) - math.log(2)) / power
        divergence = -np.logaddexp(rest, math.log(2) + mean) - LOG_ROUNDING * (1 + 1 / (order - 1))
        return np.asarray(2 / order * divergence)

    return np.sqrt(np.maximum(largest(squared, ORDERS), 0))
