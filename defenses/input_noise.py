"""Noise on the input, drawn when the net is asked: a defense that is known to be broken."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from robustbench_lite.attacks.smooth_adv import SmoothAdv
from robustbench_lite.certify.noise import GaussianNoise
from robustbench_lite.defenses.voting import Voting

if TYPE_CHECKING:
    from robustbench_lite.attacks.base import Attack
    from robustbench_lite.core.threats import Threat

__all__ = ["InputNoise"]


class InputNoise(Voting):
    """Answers by a net's vote on `draws` copies of the image with Gaussian noise; one draw is a coin's throw.

    It certifies nothing, and on a net that was not trained under the noise it hides the gradient and little else: an
    attacker who averages over draws finds what there is to find. `SmoothedClassifier` is the defense that this is the
    start of.

    Source: Li, Chen, Wang, Carin, "Certified Adversarial Robustness with Additive Noise", NeurIPS 2019,
    arXiv:1809.03113; broken, as all defenses that only randomise: Athalye, Carlini, Wagner 2018, arXiv:1802.00420.
    Departures: one draw an answer, as deployed (their code counts 100 for its certificate), sigma 0.25 (0.7 on MNIST),
    and training on noisy images without their stability term, the cross-entropy between the answers with and without.

    Args:
        net: the net inside.
        sigma: standard deviation of the noise, in the units of the images.
        draws: votes of one answer.

    Raises:
        ValueError: sigma not positive, draws below 1, or a net that is stochastic.
    """

    def __init__(self, net: nn.Module, sigma: float, draws: int = 1) -> None:
        super().__init__(net, draws)
        self.sigma = GaussianNoise(sigma).sigma

    def draw(self, x: Tensor) -> Tensor:
        """Return the net's logits (B, K) under fresh noise."""
        logits: Tensor = self.net(x + self.sigma * torch.randn_like(x))
        return logits

    def adaptive_attacks(self, threat: Threat) -> list[Attack]:
        """Return PGD on the soft classifier of fixed draws."""
        attack = SmoothAdv(loss="margin")
        return [attack] if attack.supports(threat) else []
