"""The pre-activation ResNet-18 for 32x32 images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from robustbench_lite.models.layers import Layers, normalization
from robustbench_lite.models.residual import initialize, stage

__all__ = ["PreActResNet18"]


class PreActResNet18(Layers):
    """A 3x3 convolution, four stages of two pre-activation blocks, BN, ReLU, mean over the image, fc.

    Source: He et al. 2016, arXiv:1603.05027, in the form for small images that the adversarial-training literature
    uses: no pooling at the start, widths 64, 128, 256, 512. 11.17 million parameters. Takes images of any size that
    three halvings leave something of; 32x32 is what it is made for.

    Args:
        in_channels: channels of the images.
        num_classes: number of logits.
        width: channels of the first stage.
        mean: subtracted first, one value a channel.
        std: divided by after that, one value a channel.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        *,
        width: int = 64,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
            stage(2, width, width, 1),
            stage(2, width, 2 * width, 2),
            stage(2, 2 * width, 4 * width, 2),
            stage(2, 4 * width, 8 * width, 2),
            nn.BatchNorm2d(8 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8 * width, num_classes),
            normalize=normalization(mean, std, in_channels),
        )
        initialize(self)
