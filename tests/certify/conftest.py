"""Random nets of every kind that interval bounds know, and points of a threat to beat the bounds with."""

from __future__ import annotations

import random
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
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks once on "same" padding of an even kernel
            net = NETS[name]()
        _scramble(net)
    return net.double().eval()


class Joined(nn.Module):
    """Several branches over one value, and a function that joins what they return."""

    def __init__(self, join: Callable[..., Tensor], *branches: nn.Module) -> None:
        super().__init__()
        self.join, self.branches = join, nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(*[branch(x) for branch in self.branches])


class Twice(nn.Module):
    """One module, used twice."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(torch.tanh(self.module(x)))


class Constant(nn.Module):
    """A function of the value and of a fixed tensor that broadcasts against it."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], value: Tensor) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("value", value)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.value)


ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU,
    nn.ReLU,
    nn.ReLU,
    lambda: nn.LeakyReLU(0.2),
    lambda: nn.LeakyReLU(1.5),
    lambda: nn.ELU(0.7),
    lambda: nn.ELU(1.6),
    lambda: nn.Softplus(2.0, 1.0),
    nn.Tanh,
    nn.Sigmoid,
    lambda: Lambda(torch.atan),
    nn.GELU,
    lambda: nn.GELU(approximate="tanh"),
    nn.SiLU,
]


def _conv(draw: random.Random, shape: tuple[int, ...], outputs: int | None = None) -> nn.Module:
    groups = draw.choice([1, 1, shape[0]])
    outputs = groups * draw.randint(1, 2) if outputs is None else outputs
    groups = groups if outputs % groups == 0 else 1
    mode = draw.choice(["zeros"] * 4 + ["reflect", "circular", "replicate"])
    kernel, dilation = (draw.randint(1, 4), draw.randint(1, 4)), draw.choice([1, 1, (2, 1), 2])
    stride, padding = (draw.randint(1, 3), draw.randint(1, 3)), (draw.randint(0, 2), draw.randint(0, 2))
    if draw.random() < 0.2:
        stride, padding = (1, 1), "same"
    return nn.Conv2d(shape[0], outputs, kernel, stride, padding, dilation, groups, draw.random() < 0.7, mode)


def _pool(draw: random.Random, linear: bool) -> nn.Module:
    kernel, stride, ceil = (draw.randint(1, 3), draw.randint(2, 3)), draw.randint(1, 3), draw.random() < 0.5
    padding = (kernel[0] // 2, kernel[1] // 2) if draw.random() < 0.5 else 0
    kinds: list[Callable[[], nn.Module]] = [
        lambda: nn.AvgPool2d(kernel, stride, padding, ceil, draw.random() < 0.5, draw.choice([None, None, 5])),
        lambda: nn.AdaptiveAvgPool2d(draw.choice([1, (2, None), (3, 2), 5])),
    ]
    if not linear:
        kinds += [lambda: nn.MaxPool2d(kernel, stride, padding, draw.randint(1, 2), ceil_mode=ceil)] * 2
    return draw.choice(kinds)()


def _moves(draw: random.Random, shape: tuple[int, ...]) -> nn.Module:
    shapes = {
        3: [(shape[0], 1, 1), (1, *shape[1:]), shape, (1, shape[0], 1, 1), (shape[-1],), ()],
        2: [shape, (shape[-1],), (1, 1, shape[-1]), ()],
        1: [shape, (1, *shape), ()],
    }[len(shape)]
    fixed = torch.randn(draw.choice(shapes))
    away = fixed.sign() * (0.5 + fixed.abs())
    kinds: list[nn.Module] = [
        Constant(lambda x, c: x * c, fixed),
        Constant(lambda x, c: c - x, fixed),
        Constant(lambda x, c: x / c, away),
        Constant(lambda x, c: torch.add(c, x, alpha=0.5), fixed),
        Lambda(lambda x: x + x),
        Lambda(lambda x: x - 0.3 * x),
        Lambda(lambda x: -2 * x + 1),
        nn.Dropout(0.5),
    ]
    if len(shape) == 3:
        sides = tuple(draw.randint(-1, 2) for _ in range(4))
        kinds += [
            nn.BatchNorm2d(shape[0]),
            nn.BatchNorm2d(shape[0], affine=False),
            Lambda(lambda x: x.permute(0, 1, 3, 2)),
            Lambda(lambda x: x.transpose(1, 2)),
            Lambda(lambda x: x[:, :, ::2, 1:]),
            Lambda(lambda x: x[:, -1:, :-1]),
            Lambda(lambda x: x[..., 1::3]),
            Lambda(lambda x: F.pad(x, sides, value=0.3)),
            Lambda(lambda x: F.pad(x, (0, 1, 2, 0, 1, 0), value=-0.5)),
            Lambda(lambda x: F.pad(x, (1, 1, 1, 0), mode="reflect")),
            Lambda(lambda x: F.pad(x, (0, 1, 1, 0), mode="circular")),
            Lambda(lambda x: x.flatten(2)),
            Lambda(lambda x: x.reshape(x.shape[0], -1)),
            Lambda(lambda x: x.mean((2, 3), keepdim=True)),
            Lambda(lambda x: x.mean(1)),
            nn.Linear(shape[-1], draw.randint(1, 4)),
        ]
    if len(shape) == 2:
        kinds += [Lambda(lambda x: x.unsqueeze(1)), Lambda(lambda x: x[:, 0]), Lambda(lambda x: x.mean(2))]
    if len(shape) < 3:
        kinds += [nn.Linear(shape[-1], draw.randint(1, 6))] * 4
    if len(shape) == 1:
        kinds += [nn.BatchNorm1d(shape[0]), Lambda(lambda x: x[:, None, None])]
    return draw.choice(kinds)


def _joins(draw: random.Random, shape: tuple[int, ...], linear: bool) -> nn.Module:
    if len(shape) != 3:
        wide = draw.choice([lambda a, b: torch.cat([a, b], -1), lambda a, b: a - b, lambda a, b: torch.cat([b, a], 1)])
        return Joined(wide, nn.Identity(), nn.Linear(shape[-1], shape[-1]))
    channels, other = shape[0], nn.Identity() if linear else draw.choice(ACTIVATIONS)()
    inner = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), other, nn.Conv2d(channels, channels, 1))
    down = nn.Sequential(nn.Conv2d(channels, channels, 3, 2, 1), other, nn.Conv2d(channels, 2, (2, 1), 1, (1, 0)))
    short = nn.Sequential(nn.Conv2d(channels, 2, 1, 2), nn.ZeroPad2d((0, 0, 0, 1)))
    add, minus = (lambda a, b: a + b), (lambda a, b: torch.sub(a, b, alpha=2))
    kinds: list[nn.Module] = [
        Joined(add, inner, nn.Identity()),
        Joined(minus, nn.Identity(), inner),
        Joined(add, short, down),
        Joined(minus, down, short),
        Joined(lambda a, b: a + b.mean((2, 3), keepdim=True), nn.Identity(), inner),
        Joined(lambda a, b: a - b.mean(1, keepdim=True), inner, nn.Identity()),
        Joined(lambda a, b, c: torch.cat([a, b, c], 1), nn.Identity(), inner, _conv_like(channels)),
        Joined(lambda a, b: torch.cat([a, b], 3), inner, nn.Identity()),
        Joined(lambda a, b: torch.cat([a, a, b], 2), nn.Identity(), inner),
        Joined(lambda a, b: torch.cat([a.flatten(1), b.flatten(1)], 1), inner, nn.AdaptiveAvgPool2d(2)),
    ]
    if not linear:
        kinds += [Twice(_conv_like(channels)), Joined(lambda a, b: F.relu(a - b) + a, inner, nn.Identity())]
    return draw.choice(kinds)


def _conv_like(channels: int) -> nn.Module:
    return nn.Conv2d(channels, channels, 3, padding=1)


def _step(draw: random.Random, shape: tuple[int, ...], linear: bool) -> nn.Module:
    kind = draw.random()
    if kind < 0.3 and not linear:
        return draw.choice(ACTIVATIONS)()
    if kind < 0.6 and len(shape) == 3:
        return _conv(draw, shape)
    if kind < 0.7 and len(shape) == 3:
        return _pool(draw, linear)
    if kind < 0.85:
        return _joins(draw, shape, linear)
    return _moves(draw, shape)


def random_net(seed: int, linear: bool = False) -> tuple[nn.Module, tuple[int, ...]]:
    """A random net, float64 in eval mode, and the shape of its images; `linear`: an affine one."""
    draw = random.Random(seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        first = draw.choice([(1, 1, 1), (3, 1, 6), (1, 7, 5), (2, 6, 6), (2, 9, 10), (3, 4, 8), (4, 5, 5)])
        steps: list[nn.Module] = []
        value, wanted = torch.zeros(2, *first, dtype=torch.float64), draw.randint(3, 9)
        for _ in range(200):
            step = _step(draw, tuple(value.shape[1:]), linear).double().eval()
            try:
                after = step(value)
            except (RuntimeError, IndexError, ValueError):  # a window larger than the map, say
                continue
            if not 1 <= after[0].numel() <= 600 or not after.isfinite().all():  # a pool of padding alone is -inf
                continue
            steps, value = [*steps, step], after
            if len(steps) >= wanted:
                break
        steps.append(nn.Flatten())
        size, classes = value[0].numel(), draw.randint(2, 4)
        if size not in (2, 3, 4) or draw.random() < 0.5:
            hidden = draw.randint(3, 9)
            middle = nn.Identity() if linear else draw.choice(ACTIVATIONS)()
            steps += [nn.Linear(size, hidden), middle, nn.Linear(hidden, classes)]
        if draw.random() < 0.2 and not linear:
            steps.append(draw.choice(ACTIVATIONS)())
        net = nn.Sequential(*steps)
        _scramble(net)
        return net.double().eval(), first


def _scramble(net: nn.Module) -> None:
    """Random running statistics, and BatchNorm factors of both signs."""
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 2.0)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)


def points(
    x: Tensor,
    norm: str,
    eps: float,
    count: int,
    generator: torch.Generator,
    bounds: tuple[float, float] = (0.0, 1.0),
    per: str = "pixel",
) -> Tensor:
    """(count, C, H, W) points of the threat around one image: half on its boundary where the box allows it."""
    rows = torch.randn((count, x.numel()), dtype=torch.float64, generator=generator)
    even = torch.arange(count)[:, None] % 2 == 0
    if norm == "l0":
        return _sparse(x, int(eps), rows.reshape(count, *x.shape), bounds, per, generator)
    if norm == "linf":
        step = torch.where(even, rows.sign(), rows.tanh())
    elif norm == "l2":
        few = rows * (torch.rand(rows.shape, generator=generator, dtype=torch.float64) < 3 / rows.shape[1])
        step = torch.where(even, rows, few)
        step = step / step.norm(dim=1, keepdim=True).clamp_min(1e-12)
    else:
        spread = -torch.rand(rows.shape, dtype=torch.float64, generator=generator).log() * rows.sign()
        corner = torch.zeros_like(rows)
        place = torch.randint(0, x.numel(), (count, 1), generator=generator)
        corner.scatter_(1, place, rows[:, :1].sign())
        step = torch.where(even, corner, spread / spread.abs().sum(1, keepdim=True))
    return (x + eps * step.reshape(count, *x.shape)).clamp(*bounds)


def _sparse(
    x: Tensor, moved: int, rows: Tensor, bounds: tuple[float, float], per: str, generator: torch.Generator
) -> Tensor:
    low, high = bounds
    new = torch.where(rows > 0.5, high, torch.where(rows < -0.5, low, low + (high - low) * (rows + 0.5)))
    order = torch.rand(len(rows), *(x.shape if per == "coordinate" else (1, *x.shape[1:])), generator=generator)
    rank = order.flatten(1).argsort(1).argsort(1).reshape(order.shape)
    return torch.where(rank < moved, new, x)


@pytest.fixture(params=sorted(NETS))
def net_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_net() -> Callable[..., nn.Module]:
    return make


@pytest.fixture
def make_random_net() -> Callable[..., tuple[nn.Module, tuple[int, ...]]]:
    return random_net


@pytest.fixture
def threat_points() -> Callable[..., Tensor]:
    return points


@pytest.fixture
def images() -> Tensor:
    return torch.rand(5, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def kinds() -> dict[str, Any]:
    """The classes of the nets, for tests that build their own."""
    return {"ResNet": ResNet, "Normalized": Normalized, "Block": Block, "Lambda": Lambda, "Joined": Joined}
