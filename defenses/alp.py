"""Adversarial logit pairing: adversarial training that pulls the logits of both images together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.defenses._examples import check_weight, logits_of
from robustbench_lite.defenses.adversarial_training import AdversarialTraining
from robustbench_lite.defenses.base import Batch, Step
from robustbench_lite.defenses.ramps import ramp

if TYPE_CHECKING:
    from robustbench_lite.core.rng import Streams

__all__ = ["ALP"]


@dataclass(frozen=True)
class ALP(AdversarialTraining):
    """Minimise the loss of adversarial training plus weight * mean((z(x) - z(x'))^2).

    The mean is over samples and classes. A sparring partner: its claims for ImageNet fell to stronger attacks
    (Engstrom, Ilyas, Athalye 2018, arXiv:1807.10272), and on MNIST it gains under a baseline PGD what it does not hold
    under the strongest attack (Mosbach, Andriushchenko, Trost, Hein, Klakow 2018, arXiv:1810.12042). Judge it by many
    restarts, other losses and searches without gradients.

    Source: Kannan, Kurakin, Goodfellow, "Adversarial Logit Pairing", 2018, arXiv:1803.06373.
    Departure: the optional warm-up and ramp.

    Args:
        attack: as in `AdversarialTraining`, and so the next four.
        threat: what the adversary may do.
        mix: the share of the clean loss; 0.5 is the original's mixed minibatch.
        warmup: share of the training on clean images alone.
        ramp: share of the training, after the warm-up, in which eps rises linearly from 0.
        weight: of the pairing; the default is ours.

    Raises:
        ValueError: as in `AdversarialTraining`, or a negative weight.
    """

    mix: float = 0.5
    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("weight", self.weight)

    def loss(self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams) -> Tensor:
        """Return mix * CE(clean) + (1 - mix) * CE(adversarial) + weight * the squared distance of the logits."""
        share = ramp(step.progress, self.warmup, self.ramp)
        if share == 0:
            return F.cross_entropy(model(batch.x).float(), batch.y)
        clean, adversarial = logits_of(model, batch.x, self.examples(model, batch, share, streams))
        return self.mixed(clean, adversarial, batch.y) + self.weight * F.mse_loss(clean, adversarial)
