"""PixelDP as a defense: the vote of a net with a noise layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from robustbench_lite.attacks.pgd import PGD
from robustbench_lite.certify._sensitivity import layer_of
from robustbench_lite.certify.inside import Inside
from robustbench_lite.core.errors import lookup
from robustbench_lite.defenses.noise_after import noise_after
from robustbench_lite.defenses.pixel_dp_training import PIXEL_DP_NOISE
from robustbench_lite.defenses.pixel_dp_vote import PixelDPVote
from robustbench_lite.defenses.voting import Voting

if TYPE_CHECKING:
    from robustbench_lite.attacks.base import Attack
    from robustbench_lite.certify.base import Certifier
    from robustbench_lite.core.threats import Threat

__all__ = ["PixelDPClassifier"]


class PixelDPClassifier(Voting):
    """Answers the class with the largest mean over draws of the noise layer, the mean of one-hot answers: a vote.

    Its certificate is `certify.PixelDP` on votes under the same noise in the same place, less what a vote of `draws`
    loses (`PixelDPVote`).

    Source: Lecuyer, Atlidakis, Geambasu, Hsu, Jana, "Certified Robustness to Adversarial Examples with Differential
    Privacy", IEEE S&P 2019, arXiv:1802.03471.
    Departures: those of `certify.PixelDP`; the mean of one-hot answers, which they offer beside that of softmax
    outputs, for which one bound serves all certificates by votes; 1,000 draws, not 500.

    Args:
        net: trained through the same noise.
        scale: standard deviation of Gaussian noise, or b of Laplace noise, in the units of what it is added to.
        layer: name of the module whose output it is added to, as in `named_modules`, or its number in a
            `Sequential`; None: the input.
        noise: "gaussian" or "laplace".
        n0: draws that choose the class of a certificate.
        n: further draws, that measure the probabilities.
        alpha: probability with which a certificate may be wrong.
        draws: votes of one answer.

    Raises:
        ValueError: a setting out of range, a layer that the net does not have, or a net that is stochastic.
    """

    def __init__(
        self,
        net: nn.Module,
        scale: float,
        layer: str | int | None = None,
        noise: str = "gaussian",
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        draws: int = 1000,
    ) -> None:
        super().__init__(net, draws)
        self.scale, self.noise, self.n0, self.n, self.alpha = scale, noise, n0, n, alpha
        self.layer = None if layer is None else str(layer)
        self.certifier  # noqa: B018  (it checks its settings)
        if layer is not None:
            layer_of(net, str(layer))

    @property
    def certifier(self) -> PixelDPVote:
        """What certifies the answers, given the net."""
        law = lookup(self.noise, PIXEL_DP_NOISE, "noise")(self.scale)
        return PixelDPVote(law, self.layer, self.draws, n0=self.n0, n=self.n, alpha=self.alpha)

    def draw(self, x: Tensor) -> Tensor:
        """Return the net's logits (B, K) under fresh noise."""
        with noise_after(self.net, self.layer, self._drawn):
            logits: Tensor = self.net(x)
        return logits

    def _drawn(self, output: Tensor) -> Tensor:
        if self.noise == "gaussian":
            return self.scale * torch.randn_like(output)
        law = torch.empty_like(output, requires_grad=False)
        return self.scale * (law.exponential_() - torch.empty_like(law).exponential_())

    def adaptive_attacks(self, threat: Threat) -> list[Attack]:
        """Return PGD under the margin loss, which meets the soft vote as its view."""
        attack = PGD(steps=100, loss="margin")
        return [attack] if attack.supports(threat) else []

    def certifiers(self) -> list[Certifier]:
        """Return PixelDP's certificate, on votes of the net."""
        return [Inside(self.certifier)]
