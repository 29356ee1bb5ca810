"""MART: adversarial training that minds what the net gets wrong without an adversary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.core.threats import Threat
from robustbench_lite.defenses._divergence import kl_divergence
from robustbench_lite.defenses._examples import check_examples, check_weight, examples, logits_of, part_of
from robustbench_lite.defenses.base import Batch, Objective, Step
from robustbench_lite.defenses.ramps import ramp

if TYPE_CHECKING:
    from robustbench_lite.attacks.base import Attack
    from robustbench_lite.core.rng import Streams

__all__ = ["MART", "boosted_cross_entropy"]


def boosted_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return -log p_y - log(1 - max_{k != y} p_k), (B,), of logits (B, K).

    The second logarithm is taken as a difference of two log-sums, so that value and gradient stay finite when a wrong
    class is certain.
    """
    log_p = logits.log_softmax(dim=1)
    own = y.unsqueeze(1)
    rival = log_p.detach().scatter(1, own, -float("inf")).argmax(dim=1, keepdim=True)
    without_rival = log_p.scatter(1, rival, -float("inf")).logsumexp(dim=1)
    return -log_p.gather(1, own).squeeze(1) - without_rival


@dataclass(frozen=True)
class MART(Objective):
    """Minimise BCE(p(x'), y) + weight * KL(p(x) || p(x')) * (1 - p_y(x)), x' the example of an attack.

    BCE is the boosted cross-entropy, which besides asks for a margin to the best wrong class. The divergence counts
    the more, the less the net trusts the true class on the clean image. Robust within its own threat only.

    Source: Wang, Zou, Yi, Bailey, Ma, Gu, "Improving Adversarial Robustness Requires Revisiting Misclassified
    Examples", ICLR 2020 (not on arXiv).
    Departures: the logarithms are exact, without the constants that the authors' code adds under them; clean and
    adversarial images pass through the net together, so that BatchNorm sees both; the optional warm-up and ramp.

    Args:
        attack: what finds the examples: the authors' is PGD on the cross-entropy.
        threat: what the adversary may do.
        weight: of the divergence, the authors' lambda; 6 in their code.
        warmup: share of the training on the clean cross-entropy alone.
        ramp: share of the training, after the warm-up, in which eps rises linearly from 0; for Lp threats.

    Raises:
        ValueError: a weight or share out of range, or a threat without an eps or beyond the attack.
    """

    attack: Attack
    threat: Threat
    weight: float = 6.0
    warmup: float = 0.0
    ramp: float = 0.0

    def __post_init__(self) -> None:
        check_weight("weight", self.weight)
        check_examples(self.attack, self.threat, self.warmup, self.ramp)

    def loss(self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams) -> Tensor:
        """Return BCE(adversarial) + weight * KL(p(clean) || p(adversarial)) * (1 - p_y(clean)), a mean."""
        share = ramp(step.progress, self.warmup, self.ramp)
        if share == 0:
            return F.cross_entropy(model(batch.x).float(), batch.y)
        x_adv = examples(self.attack, model, batch, part_of(self.threat, share), streams)
        clean, adversarial = logits_of(model, batch.x, x_adv)
        doubt = 1 - clean.softmax(dim=1).gather(1, batch.y.unsqueeze(1)).squeeze(1)
        divergence = kl_divergence(clean, adversarial) * doubt
        return (boosted_cross_entropy(adversarial, batch.y) + self.weight * divergence).mean()
