"""Bit-depth reduction: the net sees images of few grey levels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustbench_lite.defenses.transformed import Transformed

__all__ = ["BitDepth"]


class BitDepth(Transformed):
    """Round each value to one of 2^bits levels in [0, 1]; one bit is a threshold at 0.5.

    Source: Xu, Evans, Qi, "Feature Squeezing: Detecting Adversarial Examples in Deep Neural Networks", 2017,
    arXiv:1704.01155, where the squeezed answer is compared with the plain one; here it is the answer.
    Broken by: the identity as stand-in (Athalye, Carlini and Wagner 2018, arXiv:1802.00420).

    Args:
        net: images (B, C, H, W) to logits.
        bits: of each value, 1 to 8.

    Raises:
        ValueError: bits out of range.
    """

    def __init__(self, net: nn.Module, bits: int = 3) -> None:
        super().__init__(net)
        if not isinstance(bits, int) or not 1 <= bits <= 8:
            raise ValueError(f"bits must be a whole number from 1 to 8, got {bits!r}")
        self.bits = bits

    def transform(self, x: Tensor) -> Tensor:
        """Return the images with 2^bits levels."""
        steps = float(2**self.bits - 1)
        return torch.round(x * steps) / steps
