"""Gaussian augmentation: the training of a net that will vote under noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.certify.noise import GaussianNoise
from robustbench_lite.defenses.base import Batch, Objective, Step

if TYPE_CHECKING:
    from robustbench_lite.core.rng import Streams

__all__ = ["GaussianAugmentation"]


@dataclass(frozen=True)
class GaussianAugmentation(Objective):
    """Cross-entropy on images with Gaussian noise, one fresh draw for each sample and step; it is not cut to [0, 1].

    The net is of use inside a `SmoothedClassifier` with the same sigma; alone it claims no robustness.

    Source: Cohen, Rosenfeld, Kolter, "Certified Adversarial Robustness via Randomized Smoothing", ICML 2019,
    arXiv:1902.02918; before them Lecuyer et al., arXiv:1802.03471.

    Args:
        sigma: standard deviation of the noise, in the units of the images.

    Raises:
        ValueError: sigma not positive and finite.
    """

    sigma: float

    def __post_init__(self) -> None:
        GaussianNoise(self.sigma)  # which checks it

    def loss(self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams) -> Tensor:
        """Return the mean cross-entropy at the noisy images."""
        noise = streams.normal(*batch.x.shape[1:], dtype=batch.x.dtype)
        return F.cross_entropy(model(batch.x + self.sigma * noise).float(), batch.y)
