"""Adversarial training: learn from the worst inputs that an attack finds in the threat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.core.threats import Threat
from robustbench_lite.defenses._examples import check_examples, examples, logits_of, part_of
from robustbench_lite.defenses.base import Batch, Objective, Step
from robustbench_lite.defenses.ramps import ramp

if TYPE_CHECKING:
    from robustbench_lite.attacks.base import Attack
    from robustbench_lite.core.rng import Streams

__all__ = ["AdversarialTraining"]


@dataclass(frozen=True)
class AdversarialTraining(Objective):
    """Minimise E max_{x' in threat} CE(f(x'), y), the maximum taken by an attack on the weights of the moment.

    With `PGD` this is the training of Madry et al. (their MNIST figures: 40 steps of 0.01 within eps 0.3), with
    `FGSM` that of Goodfellow et al. The attack meets the net in eval mode, runs to the end on every sample and keeps
    each sample's highest loss; the net then learns from the result in train mode. Robust within its own threat only.

    Source: Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards Deep Learning Models Resistant to Adversarial Attacks",
    2017, arXiv:1706.06083; Goodfellow, Shlens, Szegedy, 2014, arXiv:1412.6572.
    Departure: the optional ramp of eps. A small net at MNIST's eps 0.3 otherwise stays at the constant predictor.

    Args:
        attack: what finds the examples; its hyper-parameters are its own.
        threat: what the adversary may do.
        mix: the share of the **clean** loss: mix * CE(clean) + (1 - mix) * CE(adversarial). Madry: 0, Goodfellow: 0.5.
        warmup: share of the training on clean images alone.
        ramp: share of the training, after the warm-up, in which eps rises linearly from 0; for Lp threats.

    Raises:
        ValueError: `mix` outside [0, 1), a ramp that does not fit, or a threat without an eps or beyond the attack.
    """

    attack: Attack
    threat: Threat
    mix: float = 0.0
    warmup: float = 0.0
    ramp: float = 0.0

    def __post_init__(self) -> None:
        check_examples(self.attack, self.threat, self.warmup, self.ramp)
        if not 0 <= self.mix < 1:
            raise ValueError(f"mix is the share of the clean loss, in [0, 1), got {self.mix:g}")

    def loss(self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams) -> Tensor:
        """Return mix * CE(clean) + (1 - mix) * CE(adversarial)."""
        share = ramp(step.progress, self.warmup, self.ramp)
        if share == 0:
            return F.cross_entropy(model(batch.x).float(), batch.y)
        x_adv = self.examples(self.source(model, step, state), batch, share, streams)
        if self.mix == 0:
            return F.cross_entropy(model(x_adv).float(), batch.y)
        clean, adversarial = logits_of(model, batch.x, x_adv)
        return self.mixed(clean, adversarial, batch.y)

    def source(self, model: nn.Module, step: Step, state: Any) -> nn.Module:
        """Return the net that this step's examples are made on: the one in training."""
        return model

    def examples(self, model: nn.Module, batch: Batch, share: float, streams: Streams) -> Tensor:
        """Return adversarial images (B, C, H, W) within `share` of the threat's eps."""
        return examples(self.attack, model, batch, part_of(self.threat, share), streams)

    def mixed(self, clean: Tensor, adversarial: Tensor, y: Tensor) -> Tensor:
        """Return mix * CE(clean) + (1 - mix) * CE(adversarial) of logits (B, K)."""
        return self.mix * F.cross_entropy(clean, y) + (1 - self.mix) * F.cross_entropy(adversarial, y)
