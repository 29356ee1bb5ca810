"""Randomized smoothing with Laplace noise, against l1."""

from __future__ import annotations

from dataclasses import dataclass

from robustbench_lite.certify.majority_certifier import AddedNoiseCertifier
from robustbench_lite.certify.noise import LaplaceNoise

__all__ = ["LaplaceSmoothing"]


@dataclass(frozen=True)
class LaplaceSmoothing(AddedNoiseCertifier):
    """Votes under Laplace noise of scale b: l1 radius -b * log(2 (1 - pA)).

    l2 holds at R / sqrt(d) and linf at R / d.

    Source: Teng, Lee, Yuan, "l1 Adversarial Robustness Certificates: a Randomized Smoothing Approach", 2019, with
    pB = 1 - pA; Yang et al., ICML 2020, arXiv:2002.08118.
    Departures: votes, bounds and stopping as in `RandomizedSmoothing`.

    Attributes:
        scale: b, in the units of the images; the standard deviation is sqrt(2) b.
    """

    scale: float

    @property
    def noise(self) -> LaplaceNoise:
        """Laplace noise."""
        return LaplaceNoise(self.scale)
