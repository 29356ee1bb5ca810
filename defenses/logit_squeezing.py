"""Logit squeezing: keep the logits small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.defenses._examples import check_weight
from robustbench_lite.defenses.base import Batch, Objective, Step

if TYPE_CHECKING:
    from robustbench_lite.core.rng import Streams

__all__ = ["LogitSqueezing"]


@dataclass(frozen=True)
class LogitSqueezing(Objective):
    """Minimise CE(z(x), y) + weight * mean ||z(x)||_2, under Gaussian noise.

    No adversary takes part. Known to be broken, and here as a sparring partner: it hides the gradient of the
    cross-entropy rather than the adversarial examples (Mosbach, Andriushchenko, Trost, Hein, Klakow 2018,
    arXiv:1810.12042: on MNIST 70.6 % under their baseline PGD, 5.0 % under their strongest attack).

    Source: Kannan, Kurakin, Goodfellow, "Adversarial Logit Pairing", 2018, arXiv:1803.06373.
    Departure: the norm is not squared, as in the code of Mosbach et al. Noisy images are not cut to the range of the
    images.

    Args:
        weight: of the norm; Mosbach et al. on MNIST: 0.5.
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
        """Return the cross-entropy plus the weighted norm of the logits, both of noisy images."""
        x = batch.x + self.sigma * streams.normal(*batch.x.shape[1:], dtype=batch.x.dtype)
        logits = model(x).float()
        norms: Tensor = torch.linalg.vector_norm(logits, dim=1)
        return F.cross_entropy(logits, batch.y) + self.weight * norms.mean()
