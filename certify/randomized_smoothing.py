"""Randomized smoothing with Gaussian noise."""

from __future__ import annotations

from dataclasses import dataclass

from robustbench_lite.certify.majority_certifier import AddedNoiseCertifier
from robustbench_lite.certify.noise import GaussianNoise

__all__ = ["RandomizedSmoothing"]


@dataclass(frozen=True)
class RandomizedSmoothing(AddedNoiseCertifier):
    """CERTIFY: n0 noisy copies choose a class, n others bound its probability pA; l2 radius sigma * Phi^-1(pA).

    pA is a one-sided Clopper-Pearson bound of level alpha; the answer is an abstention where it does not exceed 1/2.
    With n draws no radius above sigma * Phi^-1(alpha^(1/n)) can be proven: 3.8 sigma for the defaults. linf holds at
    R / sqrt(d) and l1 at R. The base net has to be trained with the same noise to be worth it.

    Source: Cohen, Rosenfeld, Kolter, "Certified Adversarial Robustness via Randomized Smoothing", ICML 2019,
    arXiv:1902.02918.
    Departures: many images share a forward pass; optional early stopping for a given radius (`EarlyStopping`).

    Attributes:
        sigma: standard deviation of the noise, in the units of the images.

    >>> import torch
    >>> from robustbench_lite.core.threats import Lp
    >>> def brighter(x):
    ...     light = x.flatten(1).sum(1) - 2
    ...     return torch.stack([-light, light], 1)
    >>> x, y = torch.full((1, 1, 2, 2), 0.75), torch.tensor([1])
    >>> certificate = RandomizedSmoothing(0.5, n=1000)(brighter, x, y, Lp("l2", 0.3))
    >>> certificate.certified.item(), 0.3 < certificate.radius.item() < 0.5  # the boundary is at 0.5
    (True, True)
    """

    sigma: float

    @property
    def noise(self) -> GaussianNoise:
        """Normal noise."""
        return GaussianNoise(self.sigma)
