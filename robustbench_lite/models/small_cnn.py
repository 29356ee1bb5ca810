"""The "small" net of the certification literature."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from robustbench_lite.models.layers import Layers, normalization, sides

__all__ = ["SmallCNN"]


class SmallCNN(Layers):
    """Two strided convolutions and two linear layers: 166,406 parameters (0.67 MB) on MNIST.

    conv 4x4x16 stride 2 padding 1, ReLU, conv 4x4x32 stride 2 padding 1, ReLU, flatten, fc100, ReLU, fc.
    Source: Wong and Kolter 2017, arXiv:1711.00851. Without normalisation the keys of the state dict are those of the
    plain `Sequential` ("0.weight", "2.weight", "5.weight", "7.weight"), as in the published weights.

    Args:
        in_channels: channels of the images.
        image_size: H = W, or (H, W); at least 8.
        num_classes: number of logits.
        mean: subtracted first, one value a channel.
        std: divided by after that, one value a channel.
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int | Sequence[int] = 28,
        num_classes: int = 10,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        height, width = sides(image_size, 8, "SmallCNN")
        super().__init__(
            nn.Conv2d(in_channels, 16, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * (height // 4) * (width // 4), 100),
            nn.ReLU(),
            nn.Linear(100, num_classes),
            normalize=normalization(mean, std, in_channels),
        )
