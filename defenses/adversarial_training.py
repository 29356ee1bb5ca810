"""Adversarial training: learn from the worst inputs that an attack finds in the threat."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.core.checks import parse_number
from robustbench_lite.core.threats import Lp, Threat
from robustbench_lite.defenses.base import Batch, Objective, Step
from robustbench_lite.defenses.ramps import check_ramp, ramp

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
        check_ramp(self.warmup, self.ramp)
        if not 0 <= self.mix < 1:
            raise ValueError(f"mix is the share of the clean loss, in [0, 1), got {self.mix:g}")
        if isinstance(self.threat, Lp) and (self.threat.eps is None or isinstance(self.threat.eps, Tensor)):
            raise ValueError(f"adversarial training needs a threat whose eps is one number, got {self.threat}")
        if self.ramp > 0 and not isinstance(self.threat, Lp):
            raise ValueError(f"only the eps of an Lp threat can be ramped, got {self.threat}; use ramp=0")
        if not self.attack.supports(self.threat):
            raise ValueError(f"{self.attack} does not support the threat {self.threat}")

    def loss(self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams) -> Tensor:
        """Return mix * CE(clean) + (1 - mix) * CE(adversarial)."""
        share = ramp(step.progress, self.warmup, self.ramp)
        if share == 0:
            return F.cross_entropy(model(batch.x).float(), batch.y)
        x_adv = self.examples(model, batch, share, streams)
        if self.mix == 0:
            return F.cross_entropy(model(x_adv).float(), batch.y)
        # one pass over both halves: BatchNorm then sees the mixture that it must serve
        clean, adversarial = model(torch.cat([batch.x, x_adv])).float().chunk(2)
        return self.mix * F.cross_entropy(clean, batch.y) + (1 - self.mix) * F.cross_entropy(adversarial, batch.y)

    def examples(self, model: nn.Module, batch: Batch, share: float, streams: Streams) -> Tensor:
        """Return adversarial images (B, C, H, W) within `share` of the threat's eps."""
        threat = self.threat
        if share < 1 and isinstance(threat, Lp):
            threat = replace(threat, eps=share * parse_number(threat.eps))  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(streams.root)
        found = self.attack(model, batch.x, batch.y, threat, stop="never", indices=batch.indices, generator=generator)
        return found.x_adv.detach()
