"""Clean logit pairing: make the logits of unrelated clean images alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.defenses._examples import check_weight
from robustbench_lite.defenses.base import Batch, Objective, Step

if TYPE_CHECKING:
    from robustbench_lite.core.rng import Streams

__all__ = ["CLP"]


@dataclass(frozen=True)
class CLP(Objective):
    """Minimise CE(z(x), y) + weight * mean((z(x_i) - z(x_j))^2) over random pairs of images, under Gaussian noise.

    No adversary takes part. Known to be broken, and here as a sparring partner: small logits make for small gradients
    of the cross-entropy, on which a short PGD stalls; many restarts, losses that do not saturate and searches without
    gradients fell almost every image (Mosbach, Andriushchenko, Trost, Hein, Klakow 2018, arXiv:1810.12042: on MNIST
    62.4 % under their baseline PGD, 4.1 % under their strongest attack).

    Source: Kannan, Kurakin, Goodfellow, "Adversarial Logit Pairing", 2018, arXiv:1803.06373.
    Departure: pairs are the two halves of a shuffled batch, as in the code of Mosbach et al.; of an odd batch the last
    image has no partner. Noisy images are not cut to the range of the images.

    Args:
        weight: of the pairing; the mean is over pairs and classes. The default is ours.
        sigma: standard deviation of the noise in the units of the images; 0: none.

    Raises:
        ValueError: a negative weight or sigma.
    """

    weight: float = 0.5
    sigma: float = 0.5

    def __post_init__(self) -> None:
        check_weight("weight", self.weight)
        if not 0 <= self.sigma < float("inf"):
            raise ValueError(f"sigma is the standard deviation of the noise, >= 0, got {self.sigma:g}")

    def loss(self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams) -> Tensor:
        """Return the cross-entropy plus the weighted squared distance of the pairs' logits, both of noisy images."""
        x = batch.x + self.sigma * streams.normal(*batch.x.shape[1:], dtype=batch.x.dtype)
        logits = model(x).float()
        loss, half = F.cross_entropy(logits, batch.y), len(logits) // 2
        if half == 0:  # one image, no pair
            return loss
        return loss + self.weight * F.mse_loss(logits[:half], logits[half : 2 * half])
