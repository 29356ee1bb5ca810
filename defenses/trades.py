"""TRADES: the clean loss, and how far an adversary can move the prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.core.models import frozen
from robustbench_lite.core.threats import Threat
from robustbench_lite.defenses._divergence import DivergenceAscent, FarFrom, kl_divergence
from robustbench_lite.defenses._examples import check_examples, check_weight, examples, logits_of, part_of
from robustbench_lite.defenses.base import Batch, Objective, Step
from robustbench_lite.defenses.ramps import ramp

if TYPE_CHECKING:
    from robustbench_lite.core.rng import Streams

__all__ = ["TRADES"]


@dataclass(frozen=True)
class TRADES(Objective):
    """Minimise CE(f(x), y) + beta * max_{x' in threat} KL(p(x) || p(x')).

    The first term asks for accuracy, the second for a prediction that stays where it is, right or wrong; beta trades
    one for the other. The maximum is taken by projected ascent of the divergence itself, on the weights of the moment
    in eval mode; the gradient of the loss reaches the weights through both predictions. Robust within its own threat
    only.

    Source: Zhang, Yu, Jiao, Xing, El Ghaoui, Jordan, "Theoretically Principled Trade-off between Robustness and
    Accuracy", 2019, arXiv:1901.08573.
    Departures: of the points on the way the one of largest divergence is kept, not the last; clean and adversarial
    images pass through the net together, so that BatchNorm sees both; the optional ramp of eps; any norm.

    Args:
        threat: an linf, l2 or l1 ball with one eps.
        beta: weight of the divergence; the authors' 1/lambda, 6 on CIFAR-10 and 1 in their MNIST code.
        steps: gradient steps of the ascent; their MNIST code: 40.
        step_size: length of a step in the units of the images; None: 2.5 eps / steps. Their MNIST code: 0.01.
        sigma: standard deviation of the normal start, in the units of the images.
        warmup: share of the training on the clean loss alone.
        ramp: share of the training, after the warm-up, in which eps rises linearly from 0.

    Raises:
        ValueError: a weight, step or share out of range, or another threat.
    """

    threat: Threat
    beta: float = 6.0
    steps: int = 10
    step_size: float | str | None = None
    sigma: float = 1e-3
    warmup: float = 0.0
    ramp: float = 0.0

    def __post_init__(self) -> None:
        check_weight("beta", self.beta)
        check_examples(self._ascent(), self.threat, self.warmup, self.ramp)

    def loss(self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams) -> Tensor:
        """Return CE(clean) + beta * KL(p(clean) || p(adversarial)), means over the batch."""
        share = ramp(step.progress, self.warmup, self.ramp)
        if share == 0:
            return F.cross_entropy(model(batch.x).float(), batch.y)
        clean, adversarial = logits_of(model, batch.x, self.examples(model, batch, share, streams))
        return F.cross_entropy(clean, batch.y) + self.beta * kl_divergence(clean, adversarial).mean()

    def examples(self, model: nn.Module, batch: Batch, share: float, streams: Streams) -> Tensor:
        """Return the images (B, C, H, W) of largest divergence within `share` of the threat's eps."""
        with frozen(model), torch.no_grad():
            goal = FarFrom(batch.y, model(batch.x).float())
        return examples(self._ascent(), model, batch, part_of(self.threat, share), streams, goal)

    def _ascent(self) -> DivergenceAscent:
        return DivergenceAscent(self.steps, self.step_size, self.sigma)
