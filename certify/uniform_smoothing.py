"""Randomized smoothing with uniform noise, against l1."""

from __future__ import annotations

from dataclasses import dataclass

from robustbench_lite.certify.majority_certifier import AddedNoiseCertifier
from robustbench_lite.certify.noise import UniformNoise

__all__ = ["UniformSmoothing"]


@dataclass(frozen=True)
class UniformSmoothing(AddedNoiseCertifier):
    """Votes under uniform noise on [-half_width, half_width]: l1 radius 2 * half_width * (pA - 1/2).

    Never beyond half_width, which unanimous votes approach. l2 holds at R / sqrt(d) and linf at R / d.

    Source: Yang, Duan, Hu, Salman, Razenshteyn, Li, "Randomized Smoothing of All Shapes and Sizes", ICML 2020,
    arXiv:2002.08118; the bound is also in Lee, Yuan, Chang, Jaakkola, NeurIPS 2019, arXiv:1906.04948.
    Departures: votes, bounds and stopping as in `RandomizedSmoothing`.

    Attributes:
        half_width: in the units of the images; the standard deviation is half_width / sqrt(3).
    """

    half_width: float

    @property
    def noise(self) -> UniformNoise:
        """Uniform noise."""
        return UniformNoise(self.half_width)
