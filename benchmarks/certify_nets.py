"""The nets that the benchmark of certifiers runs on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from nets import DATA
from torch import Tensor, nn

from robustbench_lite.core.models import predict
from robustbench_lite.data import load_data


def stack(depth: int, width: int) -> nn.Module:
    """Return a net for 28 x 28 images with `depth` affine layers; depth 4, width 16 is conv16-conv32-fc100-fc10.

    Two convolutions of stride 2 with `width` and 2 `width` maps, 3 x 3 convolutions between them, two linear layers.
    """
    layers: list[nn.Module] = [nn.Conv2d(1, width, 4, 2, 1), nn.ReLU()]
    for _ in range(depth - 4):
        layers += [nn.Conv2d(width, width, 3, 1, 1), nn.ReLU()]
    layers += [nn.Conv2d(width, 2 * width, 4, 2, 1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(98 * width, 100), nn.ReLU(), nn.Linear(100, 10)).eval()


def perceptron(depth: int, width: int) -> nn.Module:
    """Return a net for 28 x 28 images with `depth` affine layers, the hidden ones `width` wide."""
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(784, width), nn.ReLU()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10)).eval()


def seven_layers() -> nn.Module:
    """Return a CIFAR net of five convolutions and two linear layers; the first two layers have 32,768 neurons.

    It is the seven-layer net of the literature on training with interval bounds (Shi et al. 2021, arXiv:2103.17268)
    at half its width, without batch norm.
    """
    convs: list[nn.Module] = []
    for maps, out, stride in ((3, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 1)):
        convs += [nn.Conv2d(maps, out, 3, stride, 1), nn.ReLU()]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(16384, 512), nn.ReLU(), nn.Linear(512, 10)).eval()


def seeded(make: Callable[..., nn.Module], *arguments: int) -> nn.Module:
    """Return a freshly initialised net, the same one every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(*arguments)


def small_net() -> tuple[str, nn.Module]:
    """Return conv16-conv32-fc100: others' PGD-trained weights where they are at hand, else fresh ones."""
    file = DATA / "nets" / "mnist_small_adv.pth"
    if not file.exists():
        return "conv16-conv32-fc100, fresh weights", seeded(stack, 4, 16)
    net = stack(4, 16)
    net.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    return "conv16-conv32-fc100, PGD-trained", net


def first_images(data: str, model: nn.Module, count: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Return the first images (count, C, H, W) of a test set, and what the model answers (count,)."""
    x = load_data(data, data_dir=DATA).head(count).images.to(device)
    return x, predict(model, x)


def margins_matrix(y: Tensor, num_classes: int) -> Tensor:
    """Return the rows e_y - e_j, j != y, as a specification (N, K - 1, K)."""
    unit = torch.eye(num_classes, device=y.device)
    rows = unit[y].unsqueeze(1) - unit
    return rows[torch.arange(num_classes, device=y.device) != y.unsqueeze(1)].reshape(len(y), -1, num_classes)
