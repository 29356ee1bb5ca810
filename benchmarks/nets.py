"""The nets that the benchmarks run on, and the images they get right.

MNIST: our zoo's `mnist/standard` and `mnist/pgd_at_0.3`. CIFAR-10: two nets trained by others, read from the folder
`nets` of RBL_DATA where there is one: a ResNet-20 (undefended) and a small ResNet trained with PGD at linf 2/255.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from robustbench_lite.core.models import predict
from robustbench_lite.data import load_data
from robustbench_lite.models import Normalize, WideResNet
from robustbench_lite.zoo import load_defense

DATA = Path(os.environ.get("RBL_DATA", Path(__file__).parents[2] / "shared" / "data"))


@dataclass(frozen=True)
class Subject:
    """A net, images (N, C, H, W) that it gets right, their labels (N,), the linf budget, and a fast view of the net."""

    name: str
    defended: bool
    model: nn.Module
    x: Tensor
    y: Tensor
    eps: float
    view: nn.Module | None = None


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; batch norm on request."""

    def __init__(self, planes: int, out: int, stride: int, norm: bool, shortcut: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(planes, out, 3, stride, 1, bias=not norm)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=not norm)
        self.bn1 = nn.BatchNorm2d(out) if norm else nn.Identity()
        self.bn2 = nn.BatchNorm2d(out) if norm else nn.Identity()
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + self.shortcut(x))


class ResNet2b(nn.Module):
    """The small residual net of the verification literature: 1,024 features behind two blocks without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1)
        first = nn.Sequential(nn.Conv2d(8, 16, 1, 2))
        self.layer1 = nn.Sequential(Block(8, 16, 2, False, first), Block(16, 16, 1, False, nn.Sequential()))
        self.linear1, self.linear2 = nn.Linear(1024, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out = self.layer1(torch.relu(self.conv1(x)))
        return self.linear2(torch.relu(self.linear1(out.flatten(1))))


class ResNet20(nn.Module):
    """CIFAR's ResNet-20 (He et al. 2015, 1512.03385): 16, 32 and 64 maps, zero-padded shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = self._stage(16, 16, 1), self._stage(16, 32, 2), self._stage(32, 64, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(planes: int, out: int, stride: int) -> nn.Sequential:
        def padded(x: Tensor) -> Tensor:
            return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, out // 4, out // 4))

        first = Block(planes, out, stride, True, nn.Identity() if stride == 1 else padded)
        return nn.Sequential(first, *(Block(out, out, 1, True, nn.Identity()) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean(dim=(2, 3)))


def _published(file: str, net: nn.Module, mean: list[float], std: list[float]) -> nn.Module:
    state = torch.load(DATA / "nets" / file, weights_only=True, map_location="cpu")["state_dict"]
    odd = net.load_state_dict({name.removeprefix("module."): value for name, value in state.items()}, strict=False)
    if odd.unexpected_keys or any(not name.endswith("num_batches_tracked") for name in odd.missing_keys):
        raise ValueError(f"{file} does not fit {type(net).__name__}: {odd}")
    return nn.Sequential(Normalize(mean, std), net)


def resnet2b() -> nn.Module:
    """Return the adversarially trained small ResNet."""
    return _published("cifar_resnet2b.pth", ResNet2b(), [0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616])


def resnet20() -> nn.Module:
    """Return the undefended ResNet-20."""
    return _published("cifar_resnet20.th", ResNet20(), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def wide_resnet(count: int, device: str) -> Subject:
    """Return a WideResNet-28-10 at 32 x 32 with random weights: time hardly depends on them. Its answers are right."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WideResNet(depth=28, widen_factor=10).to(device).eval()
        x = torch.rand(count, 3, 32, 32).to(device)
    with torch.no_grad():
        y = torch.cat([predict(model, part) for part in x.split(64)])
    return Subject("cifar/wide_resnet_28_10", False, model, x, y, 1 / 255)


def subjects(count: int, device: str = "cpu") -> list[Subject]:
    """Return the nets that are at hand, each with `count` test images that it gets right (ResNet-20: a quarter)."""
    makers: list[tuple[str, bool, str, float, Callable[[], nn.Module]]] = [
        ("mnist/pgd_at_0.3", True, "mnist", 0.329, lambda: load_defense("mnist/pgd_at_0.3")),
        ("mnist/standard", False, "mnist", 0.3, lambda: load_defense("mnist/standard")),
        ("cifar/resnet2b_at", True, "cifar10", 2 / 255, resnet2b),
        ("cifar/resnet20", False, "cifar10", 2 / 255, resnet20),
    ]
    found = []
    for name, defended, data, eps, make in makers:
        if data == "cifar10" and not (DATA / "nets").exists():
            continue
        model = make().to(device).eval()
        wanted = count // 4 if make is resnet20 else count  # it takes ten times as long
        images = load_data(data, data_dir=DATA).head(2 * wanted)
        x, y = images.images.to(device), images.labels.to(device)
        with torch.no_grad():
            right = (predict(model, x) == y).nonzero().flatten()[:wanted]
        found.append(Subject(name, defended, model, x[right], y[right], eps))
    return found
