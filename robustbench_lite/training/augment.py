"""Data augmentation with one random stream a sample, so that a resumed run meets the same images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from robustbench_lite.core.rng import Streams

__all__ = ["Augment", "CropFlip"]

Augment = Callable[[Tensor, Streams], Tensor]
"""From images (B, C, H, W) and the streams of the samples to images of the same shape."""


@dataclass(frozen=True)
class CropFlip:
    """Pad with zeros, crop a random window of the old size, and mirror half of the images: the usual for CIFAR.

    Args:
        padding: pixels added on each side.
        flip: whether to mirror left and right.
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"padding must be >= 0 pixels, got {self.padding}")

    def __call__(self, x: Tensor, streams: Streams) -> Tensor:
        """Return augmented images (B, C, H, W)."""
        height, width = x.shape[-2:]
        top, left = streams.integers(2 * self.padding + 1, 2).unbind(1)
        rows = top[:, None] + torch.arange(height, device=x.device)
        columns = left[:, None] + torch.arange(width, device=x.device)
        if self.flip:
            mirrored = streams.integers(2, 1).bool()
            columns = torch.where(mirrored, columns.flip(1), columns)
        padded = F.pad(x, (self.padding,) * 4)
        samples = torch.arange(len(x), device=x.device)[:, None, None]
        return padded.permute(0, 2, 3, 1)[samples, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
