"""Noise on the weights, drawn when the net is asked: a defense that is known to be broken."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from robustbench_lite.attacks.pgd import PGD
from robustbench_lite.defenses.voting import Voting

if TYPE_CHECKING:
    from robustbench_lite.attacks.base import Attack
    from robustbench_lite.core.threats import Threat

__all__ = ["WeightNoise"]


class WeightNoise(Voting):
    """Answers by the vote of `draws` nets, each the trained one with Gaussian noise on its weights.

    Meant against examples that are transferred from the trained net. The weights that one draw makes serve all images
    of a call. An attacker who averages over draws, or attacks the mean weights, is not kept out.

    Source: Zhou, Kantarcioglu, Xi, "Breaking Transferability of Adversarial Samples with Randomness", 2018,
    arXiv:1805.04613. Departure: of their two variants this is the noise, not the pool of nets.

    Args:
        net: the trained net.
        scale: standard deviation of the noise, as a multiple of that of the weights of each layer.
        draws: votes of one answer.

    Raises:
        ValueError: scale not positive and finite, draws below 1, or a net that is stochastic.
    """

    folds: ClassVar[bool] = False

    def __init__(self, net: nn.Module, scale: float, draws: int = 1) -> None:
        super().__init__(net, draws)
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be > 0 and finite, a multiple of the weights' deviation, got {scale}")
        self.scale = scale

    def draw(self, x: Tensor) -> Tensor:
        """Return the logits (B, K) of the net with fresh noise on its weights; biases stay as they are."""
        weights = {
            name: value + self.scale * value.std() * torch.randn_like(value) if value.ndim > 1 else value
            for name, value in self.net.named_parameters()
        }
        logits: Tensor = functional_call(self.net, weights, (x,))
        return logits

    def adaptive_attacks(self, threat: Threat) -> list[Attack]:
        """Return PGD under the margin loss, which meets the mean over draws as its view."""
        attack = PGD(steps=100, loss="margin")
        return [attack] if attack.supports(threat) else []
