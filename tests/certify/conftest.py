"""Random nets of every kind that interval bounds know, and points of a threat to beat the bounds with."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SHAPE = (2, 6, 6)
CLASSES = 3


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Normalized(nn.Module):
    def __init__(self, net: nn.Module, channels: int = SHAPE[0]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.rand(1, channels, 1, 1))
        self.register_buffer("std", 0.2 + torch.rand(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean) / self.std)


class Block(nn.Module):
    """A basic block as torchvision writes it: in-place ReLU, `out += identity`."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


class ZeroPaddedBlock(nn.Module):
    """The block of CIFAR's ResNet-20: a shortcut without parameters, by slicing and zero channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.more = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.more:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more // 2), "constant", 0)
        return F.relu(out + x)


class ResNet(nn.Module):
    def __init__(self, widths: tuple[int, ...], depth: int, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0])
        blocks: list[nn.Module] = []
        before = widths[0]
        for width in widths:
            for _ in range(depth):
                blocks.append(ZeroPaddedBlock(before, width, 1 if width == before else 2))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.blocks(F.relu(self.bn1(self.conv1(x))))
        out = F.avg_pool2d(out, out.size()[3])
        out = out.view(out.size(0), -1)
        return self.linear(out)


class Mixed(nn.Module):
    """Calls as functions and methods: cat, mean, permute, scalars, constants of the forward, no_grad-free plumbing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding="same")
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.head = nn.Linear(8 + 4 * 36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(2 * x - 1)) * self.scale.exp()
        h = torch.cat([h, 1 - h.sigmoid()], dim=1) - torch.tensor([0.25], dtype=x.dtype)
        pooled = h.mean((2, 3))
        turned = h[:, :4].permute(0, 2, 3, 1).reshape(x.shape[0], -1)
        return self.head(torch.cat([pooled, -turned / 3], 1))


def _conv_head(conv: nn.Module, *rest: nn.Module) -> nn.Module:
    body = nn.Sequential(conv, *(rest or (nn.ReLU(),)), nn.Flatten())
    with torch.no_grad():
        features = body.eval()(torch.zeros(1, *SHAPE)).shape[1]
    return nn.Sequential(*body, nn.Linear(features, CLASSES))


def _mlp(*activation: nn.Module) -> nn.Module:
    first = nn.Linear(72, 12)
    return nn.Sequential(nn.Flatten(), first, *activation, nn.Linear(12, 8), *activation, nn.Linear(8, CLASSES))


NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: _mlp(nn.ReLU()),
    "leaky_relu": lambda: _mlp(nn.LeakyReLU(0.2)),
    "elu": lambda: _mlp(nn.ELU(0.7)),
    "softplus": lambda: _mlp(nn.Softplus(2.0, 1.0)),
    "tanh": lambda: _mlp(nn.Tanh()),
    "sigmoid": lambda: _mlp(nn.Sigmoid()),
    "arctan": lambda: _mlp(Lambda(torch.atan)),
    "gelu": lambda: _mlp(nn.GELU()),
    "gelu_tanh": lambda: _mlp(nn.GELU(approximate="tanh")),
    "silu": lambda: _mlp(nn.SiLU()),
    "batch_norm_1d": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(72, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3)
    ),
    "conv_stride": lambda: _conv_head(nn.Conv2d(2, 4, 4, stride=2, padding=1)),
    "conv_rectangle": lambda: _conv_head(nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(2, 1))),
    "conv_dilation": lambda: _conv_head(nn.Conv2d(2, 4, 3, padding=2, dilation=2, bias=False)),
    "conv_groups": lambda: _conv_head(nn.Conv2d(2, 4, 3, padding=1, groups=2)),
    "conv_same_even": lambda: _conv_head(nn.Conv2d(2, 3, 4, padding="same")),
    "conv_valid": lambda: _conv_head(nn.Conv2d(2, 3, 3, padding="valid")),
    "conv_reflect": lambda: _conv_head(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")),
    "conv_circular": lambda: _conv_head(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")),
    "batch_norm": lambda: _conv_head(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()),
    "batch_norm_first": lambda: _conv_head(nn.BatchNorm2d(2, affine=False), nn.Conv2d(2, 3, 3), nn.ReLU()),
    "avg_pool": lambda: _conv_head(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
    "max_pool": lambda: _conv_head(nn.Conv2d(2, 3, 3, padding=1), nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
    "pool_first": lambda: _conv_head(nn.AvgPool2d(2), nn.Conv2d(2, 3, 2), nn.ReLU()),
    "adaptive_pool": lambda: _conv_head(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d((3, None))),
    "pad": lambda: _conv_head(nn.ZeroPad2d((1, 0, 2, 1)), nn.ConstantPad2d(1, 0.7), nn.Conv2d(2, 3, 3), nn.ReLU()),
    "dropout": lambda: _conv_head(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Dropout2d(0.5), nn.Dropout(0.3), nn.Identity()),
    "normalized": lambda: Normalized(_conv_head(nn.Conv2d(2, 4, 3, padding=1))),
    "normalized_mlp": lambda: Normalized(_mlp(nn.ReLU())),
    "residual": lambda: _conv_head(Block(2, 2, 1), Block(2, 4, 2)),
    "zero_padded": lambda: ResNet((2, 4), 1, channels=2, classes=CLASSES),
    "mixed": Mixed,
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, CLASSES)),
}


def make(name: str, seed: int = 0) -> nn.Module:
    """A random net of this name, float64, in eval mode, with random running statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks once on "same" padding of an even kernel
            net = NETS[name]()
        for module in net.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.running_mean.normal_()
                module.running_var.uniform_(0.3, 2.0)
                if module.affine:
                    nn.init.normal_(module.weight)  # negative factors too
                    nn.init.normal_(module.bias)
    return net.double().eval()


def points(x: Tensor, norm: str, eps: float, count: int, generator: torch.Generator) -> Tensor:
    """(count, C, H, W) points of the threat around one image: half on its boundary where the box allows it."""
    rows = torch.randn((count, x.numel()), dtype=torch.float64, generator=generator)
    if norm == "linf":
        step = torch.where(torch.arange(count)[:, None] % 2 == 0, rows.sign(), rows.tanh())
    elif norm == "l2":
        step = rows / rows.norm(dim=1, keepdim=True)
    else:
        spread = -torch.rand(rows.shape, dtype=torch.float64, generator=generator).log() * rows.sign()
        corner = torch.zeros_like(rows)
        place = torch.randint(0, x.numel(), (count, 1), generator=generator)
        corner.scatter_(1, place, rows[:, :1].sign())
        even = torch.arange(count)[:, None] % 2 == 0
        step = torch.where(even, corner, spread / spread.abs().sum(1, keepdim=True))
    return (x + eps * step.reshape(count, *x.shape)).clamp(0, 1)


@pytest.fixture(params=sorted(NETS))
def net_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_net() -> Callable[..., nn.Module]:
    return make


@pytest.fixture
def threat_points() -> Callable[..., Tensor]:
    return points


@pytest.fixture
def images() -> Tensor:
    return torch.rand(5, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def kinds() -> dict[str, Any]:
    """The classes of the nets, for tests that build their own."""
    return {"ResNet": ResNet, "Normalized": Normalized, "Block": Block, "Lambda": Lambda}
