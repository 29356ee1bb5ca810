"""Wide residual networks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from robustbench_lite.models.layers import Layers, normalization
from robustbench_lite.models.residual import initialize, stage

__all__ = ["WideResNet"]


class WideResNet(Layers):
    """WRN-d-k: a 3x3 convolution to 16 channels, three stages of (d - 4) / 6 blocks, BN, ReLU, mean over the image, fc.

    Source: Zagoruyko and Komodakis 2016, arXiv:1605.07146. Widths 16k, 32k, 64k. WRN-28-10 has 36.5 million
    parameters, WRN-34-10 46.2.

    Args:
        depth: d, six times a number plus four: 10, 16, 22, 28, 34 ...
        widen_factor: k.
        in_channels: channels of the images.
        num_classes: number of logits.
        dropout: between the convolutions of a block; the paper's is 0 or 0.3.
        mean: subtracted first, one value a channel.
        std: divided by after that, one value a channel.

    Raises:
        ValueError: a depth that is not 6 n + 4.
    """

    def __init__(
        self,
        depth: int = 28,
        widen_factor: int = 10,
        in_channels: int = 3,
        num_classes: int = 10,
        *,
        dropout: float = 0.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        blocks, left = divmod(depth - 4, 6)
        if left or blocks < 1:
            raise ValueError(f"depth must be 6 n + 4 (10, 16, 22, 28, 34 ...), got {depth}")
        width = 16 * widen_factor
        super().__init__(
            nn.Conv2d(in_channels, 16, 3, padding=1, bias=False),
            stage(blocks, 16, width, 1, dropout),
            stage(blocks, width, 2 * width, 2, dropout),
            stage(blocks, 2 * width, 4 * width, 2, dropout),
            nn.BatchNorm2d(4 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, num_classes),
            normalize=normalization(mean, std, in_channels),
        )
        initialize(self)
