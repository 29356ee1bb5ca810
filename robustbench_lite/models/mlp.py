"""A multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from robustbench_lite.models.layers import Layers, normalization, sides

__all__ = ["MLP"]


class MLP(Layers):
    """Fully connected layers with ReLU between them, on flattened images.

    Args:
        in_channels: channels of the images.
        image_size: H = W, or (H, W).
        hidden: widths of the hidden layers; none makes a linear classifier.
        num_classes: number of logits.
        mean: subtracted first, one value a channel.
        std: divided by after that, one value a channel.
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int | Sequence[int] = 28,
        hidden: Sequence[int] = (64, 64),
        num_classes: int = 10,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        height, width = sides(image_size, 1, "MLP")
        widths = [in_channels * height * width, *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(*layers, nn.Linear(widths[-1], num_classes), normalize=normalization(mean, std, in_channels))
