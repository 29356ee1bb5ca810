"""Nets that others trained, against what independent tools proved about them (skips where the files are missing)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.certify import IBP, bounds
from robustbench_lite.core.threats import Lp


def small(first: int, second: int, hidden: int) -> nn.Module:
    convs = nn.Conv2d(1, first, 4, 2, 1), nn.ReLU(), nn.Conv2d(first, second, 4, 2, 1), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*convs, nn.Linear(49 * second, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def load(net: nn.Module, path: Path) -> nn.Module:
    weights = torch.load(path, weights_only=True, map_location="cpu")
    weights = weights.get("state_dict", weights)
    names = [name for name in net.state_dict() if not name.endswith("num_batches_tracked")]  # old files have none
    net.load_state_dict(dict(zip(names, weights.values(), strict=True)), strict=False)
    return net.eval()


@pytest.fixture(scope="module")
def mnist(shared_data: Path) -> tuple[Tensor, Tensor]:
    with np.load(shared_data / "mnist.npz") as file:
        x, y = file["x_test"][:1000], file["y_test"][:1000]
    return torch.from_numpy(x).float().unsqueeze(1) / 255, torch.from_numpy(y).long()


@pytest.mark.parametrize(("eps", "share"), [(0.1, 0.944), (0.3, 0.883)])
def test_ibp_net_certifies_its_published_share(shared_data, mnist, eps, share):
    net = load(small(8, 16, 256), shared_data / "nets" / "mnist_ibp.pth")
    assert IBP()(net, *mnist, Lp("linf", eps)).certified.double().mean().item() == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize(("name", "mean"), [("mnist_small_wong_kolter", -86.559), ("mnist_small_adv", -17.203)])
def test_smallest_margins_on_foolbox_images(shared_data, name, mean):
    image = pytest.importorskip("PIL.Image")
    foolbox = pytest.importorskip("foolbox")
    folder = Path(foolbox.__file__).parent / "data"
    files = sorted(folder.glob("mnist_*.png"))
    assert len(files) == 20
    x = torch.stack([torch.from_numpy(np.array(image.open(file), dtype=np.float32)) for file in files]) / 255
    y = torch.tensor([int(file.stem.split("_")[-1]) for file in files])
    net = load(small(16, 32, 100), shared_data / "nets" / f"{name}.pth")
    margins = IBP()(net, x.reshape(20, 1, 28, 28), y, Lp("linf", 0.1)).margins
    assert margins.amin(dim=1).mean().item() == pytest.approx(mean, abs=1e-3)


def test_an_undefended_resnet_20_keeps_its_logits(shared_data, kinds):
    net = load(kinds["ResNet"]((16, 32, 64), 3), shared_data / "nets" / "cifar_resnet20.th")
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    lower, upper = bounds(net, (x, x))
    torch.testing.assert_close(lower, net(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(upper, net(x), rtol=1e-4, atol=1e-4)
