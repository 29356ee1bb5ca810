"""Frozen randomness: a randomised model that draws the same each time, so that its gradient stands still.

A second look at randomised defenses beside `EOT`: where the average is too noisy to follow, one draw, or one set of
draws, can be followed to the end (Tramer, Carlini, Brendel and Madry 2020, "On Adaptive Attacks to Adversarial Example
Defenses", 2002.08347, fix randomness to look for what it hides).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustbench_lite.core.models import Model, forward_passes

__all__ = ["Frozen"]


class Frozen(nn.Module):
    """A randomised model that answers as if each call were its first: a `view` for any attack.

        PGD()(defense, x, y, threat, view=Frozen(defense, seed=1))

    What the model draws from torch's global generators is the same in each call with images of one shape; the
    generators are left as they were.

    Args:
        model: images (B, C, H, W) to logits (B, K), or such a model's `attack_view`.
        seed: of the draws.

    Attributes:
        cost: the forward passes of one call.
    """

    def __init__(self, model: Model, seed: int = 0) -> None:
        super().__init__()
        self.model, self.seed, self.cost = model, seed, forward_passes(model)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, K) of the frozen draws."""
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed)
            return self.model(x)
