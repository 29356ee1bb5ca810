"""The base of defenses that change the image before the net sees it."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from robustbench_lite.attacks.base import Attack
from robustbench_lite.attacks.bpda import BPDA
from robustbench_lite.attacks.eot import EOT
from robustbench_lite.attacks.pgd import PGD
from robustbench_lite.core.threats import Threat
from robustbench_lite.defenses.base import Wrapper

__all__ = ["Transformed"]


class Transformed(Wrapper):
    """A net that sees a transformed image. A subclass writes `transform`, and `stand_in` where it has a better one.

    Such defenses hide the gradient and little else: through a stand-in for the transformation (BPDA), averaged over its
    draws where it is random (EOT), ordinary attacks break them (Athalye, Carlini and Wagner 2018, arXiv:1802.00420).
    Here they show what an evaluation that does not adapt would have missed.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @abstractmethod
    def transform(self, x: Tensor) -> Tensor:
        """Return what the net sees in the place of images (B, C, H, W) in [0, 1]; the same shape."""

    def stand_in(self, x: Tensor) -> Tensor:
        """Return a differentiable function close to `transform`: the identity, unless there is a better one."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Return the net's logits (B, K) of the transformed images."""
        logits: Tensor = self.net(self.transform(x))
        return logits

    def attack_view(self, samples: int = 1) -> nn.Module:
        """Return the defense with the gradient of `stand_in`; averaged over `samples` draws where it is random."""
        view = nn.Sequential(BPDA(self.transform, self.stand_in), self.net)
        return EOT(view, samples) if self.stochastic else view

    def adaptive_attacks(self, threat: Threat) -> list[Attack]:
        """Return PGD for long enough that a stand-in's error does not save the defense."""
        attack = PGD(steps=100, restarts=2, loss="margin")
        return [attack] if attack.supports(threat) and threat.size is not None else []
