"""Planted masks: nets that hide their weakness from an evaluation which does not adapt. The harness is tested on them.

Each wraps an undefended net and has no robustness of its own: whoever attacks what is behind the mask breaks it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustbench_lite.defenses import BitDepth, RandomResizePad, WeightNoise
from robustbench_lite.defenses.base import Wrapper

__all__ = ["MASKS", "Cold", "Detached", "NaNHead", "Naive"]


class Naive(nn.Module):
    """A defense of which nothing is known but its answers and the gradient that it happens to have."""

    def __init__(self, defense: nn.Module) -> None:
        super().__init__()
        self.defense = defense

    def forward(self, x: Tensor) -> Tensor:
        """Return the defense's logits (B, K)."""
        logits: Tensor = self.defense(x)
        return logits


class _Mask(Wrapper):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def attack_view(self, samples: int = 1) -> nn.Module:
        """Return the net behind the mask."""
        return self.net


class Cold(_Mask):
    """Logits times 100,000: the softmax saturates, and the cross-entropy has no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled logits (B, K)."""
        logits: Tensor = 1e5 * self.net(x)
        return logits


class Detached(_Mask):
    """The image is cut off from the graph: no loss has a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) without a way back to the image."""
        logits: Tensor = self.net(x.detach())
        return logits


class NaNHead(_Mask):
    """Answers NaN where one class is all but certain: a loss of NaN stops an attack that does not look."""

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K), NaN where the largest lies 20 above the mean."""
        logits: Tensor = self.net(x)
        sure = logits.amax(dim=1, keepdim=True) - logits.mean(dim=1, keepdim=True) > 20
        return torch.where(sure, torch.nan, logits)


MASKS: dict[str, Callable[[nn.Module], Wrapper]] = {
    "quantised": lambda net: BitDepth(net, bits=3),
    "random resize": lambda net: RandomResizePad(net, shrink=1),
    "temperature": Cold,
    "stochastic weights": lambda net: WeightNoise(net, scale=0.2),
    "detached": Detached,
    "NaN head": NaNHead,
}
"""What puts each mask on a net."""
