"""PixelDP: the certificate of differential privacy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from robustbench_lite.certify._corruptions import AddedNoise, Corruption, LayerNoise
from robustbench_lite.certify._inclusion import inclusion
from robustbench_lite.certify._search import largest
from robustbench_lite.certify.noise import GaussianNoise, LaplaceNoise
from robustbench_lite.certify.smoothing_certifier import ROUNDING
from robustbench_lite.certify.top_two_certifier import TopTwoCertifier
from robustbench_lite.certify.votes import Votes
from robustbench_lite.core.models import Model

__all__ = ["PixelDP"]

Array = NDArray[np.float64]

EPSILONS = np.geomspace(1e-6, 1.0, 97)  # privacy budgets; the Gaussian mechanism's theorem ends at 1


@dataclass(frozen=True)
class PixelDP(TopTwoCertifier):
    """Votes under noise at the input or after a first, affine layer; the radius by differential privacy.

    An (eps, delta)-private vote keeps its winner if p1 > e^(2 eps) p2 + (1 + e^eps) delta. Gaussian noise of standard
    deviation s is (eps, delta)-private against moves of length L of what it is added to if s = L sqrt(2 ln(1.25 /
    delta)) / eps, eps <= 1; for each eps the largest admissible delta is (p1 - e^(2 eps) p2) / (1 + e^eps), and the
    best eps is searched for. Laplace noise of scale b has delta = 0 and L = b eps: L = b / 2 log(p1 / p2), in l1.

    After a layer, L is divided by the layer's sensitivity, its operator norm from above: Gaussian noise l2 to l2 and l1
    to l2, Laplace noise l1 to l1. Other norms follow by inclusion (linf from l2 at 1 / sqrt(d), and so on).

    On the same p1 > 1/2 and p2 weaker than `RenyiSmoothing` and `RandomizedSmoothing`: Gaussian sizes end at 0.57 s.

    Source: Lecuyer, Atlidakis, Geambasu, Hsu, Jana, "Certified Robustness to Adversarial Examples with Differential
    Privacy", IEEE S&P 2019, arXiv:1802.03471.
    Departures: votes are counted (the paper also averages softmax outputs); n0 fresh draws choose the class, and
    100,000 others measure it at alpha = 0.001 (500 and 0.05 in the paper), so that all bounds can read the same votes;
    exact operator norms instead of Parseval training and a bound by overlaps.

    Attributes:
        noise: `GaussianNoise` or `LaplaceNoise`, in the units of what it is added to.
        layer: name of the module whose output it is added to, as in `named_modules`; None: the input.

    Raises:
        ValueError: another kind of noise, or as in `SmoothingCertifier`.
    """

    noise: GaussianNoise | LaplaceNoise
    layer: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.noise, (GaussianNoise, LaplaceNoise)):
            raise ValueError(f"noise must be GaussianNoise(...) or LaplaceNoise(...), got {self.noise!r}")

    @property
    def source(self) -> tuple[object, ...]:
        """The noise, and where it is added."""
        return (self.noise,) if self.layer is None else (self.noise, self.layer)

    def corruption(self, model: Model, x: Tensor, bounds: tuple[float, float]) -> Corruption:
        """Return the addition of noise."""
        return AddedNoise(self.noise) if self.layer is None else LayerNoise(self.noise, model, self.layer, x[:1])

    def radii(self, p1: Array, p2: Array, norm: str, votes: Votes) -> Array:
        """Return the sizes of attacks on the noisy layer, divided by its sensitivity."""
        if isinstance(self.noise, GaussianNoise):
            size = self.noise.sigma * gaussian_size(p1, p2)
        else:
            size = self.noise.scale * laplace_size(p1, p2)
        return (1 - ROUNDING) * size * self._reach(norm, votes)

    def _reach(self, norm: str, votes: Votes) -> float:
        """Return how far the input has to move in `norm` to move the noisy layer by 1."""
        if self.layer is not None and not votes.sensitivity:
            raise ValueError(
                f"noise after layer {self.layer!r} needs the layer's sensitivity, as votes have it: votes.sensitivity"
            )
        native = {self.noise.norm: 1.0} if self.layer is None else votes.sensitivity
        return max(inclusion(own, norm, votes.shape.numel()) / moved for own, moved in native.items())


def gaussian_size(p1: Array, p2: Array) -> Array:
    """Return L / s (B,) of the Gaussian mechanism for probabilities p1 > p2 (B,)."""
    first, second = p1[:, None], p2[:, None]

    def size(eps: Array) -> Array:
        delta = (first - np.exp(2 * eps) * second) / (1 + np.exp(eps))
        found = eps / np.sqrt(2 * np.log(1.25 / np.where(delta > 0, delta, 1.0)))
        return np.where(delta > 0, found, 0.0)

    return largest(size, EPSILONS)


def laplace_size(p1: Array, p2: Array) -> Array:
    """Return L / b (B,) of the Laplace mechanism for probabilities p1 > p2 > 0 (B,)."""
    return np.asarray(np.log(p1 / p2) / 2)
