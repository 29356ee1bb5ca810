"""The pre-activation residual block that ResNet-18 and the wide nets share."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["PreActBlock", "initialize", "stage"]


class PreActBlock(nn.Module):
    """BN, ReLU, conv 3x3, BN, ReLU, (dropout), conv 3x3, plus the shortcut (He et al. 2016, arXiv:1603.05027).

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input, otherwise the input itself.

    Args:
        channels: of the input.
        width: channels of the output.
        stride: of the first convolution and the shortcut.
        dropout: probability with which a value between the convolutions is zeroed in training.
    """

    def __init__(self, channels: int, width: int, stride: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.changes = channels != width or stride != 1
        self.shortcut = nn.Conv2d(channels, width, 1, stride=stride, bias=False) if self.changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width, H / stride, W / stride) for x (B, channels, H, W)."""
        active = self.relu1(self.bn1(x))
        residual = self.conv2(self.dropout(self.relu2(self.bn2(self.conv1(active)))))
        return self.shortcut(active if self.changes else x) + residual  # type: ignore[no-any-return]


def stage(blocks: int, channels: int, width: int, stride: int, dropout: float = 0.0) -> nn.Sequential:
    """Return `blocks` residual blocks, the first of which changes channels and size."""
    first = PreActBlock(channels, width, stride, dropout)
    return nn.Sequential(first, *(PreActBlock(width, width, 1, dropout) for _ in range(blocks - 1)))


def initialize(net: nn.Module) -> None:
    """Draw convolutions from He's normal distribution (fan out) and set the biases of linear layers to zero."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
