"""The net of the MNIST challenge."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from robustbench_lite.models.layers import Layers, normalization, sides

__all__ = ["LeNet"]


class LeNet(Layers):
    """Two convolutions with pooling and two linear layers: 3,274,634 parameters on MNIST.

    conv 5x5x32, ReLU, max pool 2, conv 5x5x64, ReLU, max pool 2, flatten, fc1024, ReLU, fc; the convolutions keep the
    size. Source: Madry et al. 2017, arXiv:1706.06083 (their MNIST net, in PyTorch's order of axes).

    Args:
        in_channels: channels of the images.
        image_size: H = W, or (H, W); at least 4.
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
        height, width = sides(image_size, 4, "LeNet")
        super().__init__(
            nn.Conv2d(in_channels, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * (height // 4) * (width // 4), 1024),
            nn.ReLU(),
            nn.Linear(1024, num_classes),
            normalize=normalization(mean, std, in_channels),
        )
