"""Consistency training: noisy copies of an image should get the same answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.certify.noise import GaussianNoise
from robustbench_lite.defenses.base import Batch, Objective, Step

if TYPE_CHECKING:
    from robustbench_lite.core.rng import Streams

__all__ = ["ConsistencyTraining", "consistency"]


def consistency(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far answers are apart, and how unsure their mean is.

    Args:
        logits: (B, m, K) of m copies of each image.

    Returns:
        With q_i the softmax of copy i and q their mean: mean_i KL(q || q_i), (B,), and the entropy of q, (B,), both in
        log space, so that a probability that is 0 in float32 does no harm.

    >>> import torch
    >>> apart, unsure = consistency(torch.tensor([[[0.0, 0.0], [0.0, 0.0]]]))
    >>> apart.item(), round(unsure.item(), 4)
    (0.0, 0.6931)
    """
    each = logits.log_softmax(dim=2)
    mean = each.logsumexp(dim=1) - math.log(logits.shape[1])
    weight = mean.exp()
    apart = (weight * (mean - each.mean(dim=1))).sum(dim=1)
    return apart, -(weight * mean).sum(dim=1)


@dataclass(frozen=True)
class ConsistencyTraining(Objective):
    """Minimise mean_i CE(f(x + e_i), y) + weight * mean_i KL(q || q_i) + entropy * H(q), q the mean of the m softmaxes.

    For a `SmoothedClassifier` with the same sigma: m passes a step, and no attack.

    Source: Jeong, Shin, "Consistency Regularization for Certified Robustness of Smoothed Classifiers", NeurIPS 2020,
    arXiv:2006.04062; their MNIST: two draws, weight 10 to 20, entropy 0.5.

    Args:
        sigma: standard deviation of the noise, in the units of the images.
        weight: of the divergence (lambda of the paper).
        entropy: weight of the entropy of the mean (eta of the paper).
        samples: draws m, at least 2.

    Raises:
        ValueError: sigma not positive, a negative weight, or fewer than two samples.
    """

    sigma: float
    weight: float = 10.0
    entropy: float = 0.5
    samples: int = 2

    def __post_init__(self) -> None:
        GaussianNoise(self.sigma)  # which checks it
        for name in ("weight", "entropy"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {getattr(self, name)}")
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 2:
            raise ValueError(f"samples must be a whole number of copies to compare, at least 2, got {self.samples!r}")

    def loss(self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams) -> Tensor:
        """Return cross-entropy, divergence and entropy, weighted; means over the batch."""
        noise = streams.normal(self.samples, *batch.x.shape[1:], dtype=batch.x.dtype)
        logits = model((batch.x.unsqueeze(1) + self.sigma * noise).flatten(0, 1)).float()
        apart, unsure = consistency(logits.reshape(len(batch.x), self.samples, -1))
        fit = F.cross_entropy(logits, batch.y.repeat_interleave(self.samples))
        return fit + (self.weight * apart + self.entropy * unsure).mean()
