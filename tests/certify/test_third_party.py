"""Nets that others trained, against what independent tools proved about them (skips where the files are missing)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.attacks import PGD
from robustbench_lite.certify import CROWN, CROWNIBP, IBP, AlphaCROWN, Cascade, bounds
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


@pytest.fixture(scope="module")
def foolbox_images() -> tuple[Tensor, Tensor]:
    image = pytest.importorskip("PIL.Image")
    foolbox = pytest.importorskip("foolbox")
    folder = Path(foolbox.__file__).parent / "data"
    files = sorted(folder.glob("mnist_*.png"))
    assert len(files) == 20
    x = torch.stack([torch.from_numpy(np.array(image.open(file), dtype=np.float32)) for file in files]) / 255
    return x.reshape(20, 1, 28, 28), torch.tensor([int(file.stem.split("_")[-1]) for file in files])


@pytest.mark.parametrize(
    ("name", "certifier", "mean", "certified"),
    [
        ("mnist_small_wong_kolter", IBP(), -86.559, 0),
        ("mnist_small_wong_kolter", CROWNIBP(), -20.731, 0),
        ("mnist_small_wong_kolter", CROWN(), 5.421, 18),
        ("mnist_small_adv", IBP(), -17.203, 0),
        ("mnist_small_adv", CROWNIBP(), -0.652, 8),
        ("mnist_small_adv", CROWN(), 3.212, 18),
    ],
)
def test_smallest_margins_on_foolbox_images(shared_data, foolbox_images, name, certifier, mean, certified):
    """What other tools printed, to their three digits; CROWN with each layer cut with its interval bounds."""
    net = load(small(16, 32, 100), shared_data / "nets" / f"{name}.pth")
    found = certifier(net, *foolbox_images, Lp("linf", 0.1))
    smallest = found.margins.amin(dim=1).mean().item()
    assert smallest >= mean - 5e-4 - 1e-4
    assert smallest == pytest.approx(mean, abs=2e-3)
    assert int(found.certified.sum()) == certified


def test_alpha_crown_and_the_cascade_on_foolbox_images(shared_data, foolbox_images):
    for name in ("mnist_small_wong_kolter", "mnist_small_adv"):
        net = load(small(16, 32, 100), shared_data / "nets" / f"{name}.pth")
        found = [c(net, *foolbox_images, Lp("linf", 0.1)) for c in (CROWN(), AlphaCROWN(), Cascade())]
        assert (found[1].margins >= found[0].margins - 1e-9).all()
        assert (found[1].certified >= found[0].certified).all()
        assert (found[2].certified >= found[1].certified).all()


class Basic(nn.Module):
    """The block of `cifar_resnet2b`: no BatchNorm, ReLU after the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + self.shortcut(x))


class ResNet2b(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1)
        self.layer1 = nn.Sequential(Basic(8, 16, 2), Basic(16, 16, 1))
        self.linear1, self.linear2 = nn.Linear(1024, 100), nn.Linear(100, 10)
        self.register_buffer("mean", torch.tensor([0.4914, 0.4822, 0.4465]).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.2471, 0.2435, 0.2616]).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer1(torch.relu(self.conv1((x - self.mean) / self.std)))
        return self.linear2(torch.relu(self.linear1(h.flatten(1))))


def resnet_2b(shared_data: Path) -> nn.Module:
    return load(ResNet2b(), shared_data / "nets" / "cifar_resnet2b.pth")


def cifar(shared_data: Path, count: int) -> tuple[Tensor, Tensor]:
    with np.load(shared_data / "cifar10_test.npz") as file:
        x, y = file["x_test"][:count], file["y_test"][:count]
    return torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(y).long().flatten()


def test_linear_bounds_of_a_residual_net_hold_and_meet_its_logits(shared_data, threat_points):
    net = resnet_2b(shared_data).double()
    x, y = cifar(shared_data, 20)
    x = x.double()
    assert 10 <= int((net(x).argmax(1) == y).sum()) <= 18  # 69.25 % of all
    x = x[:1]
    logits = net(x)
    for method in ("crown_ibp", "crown"):
        for bound in bounds(net, Lp("linf", 0.0), method, x=x):
            torch.testing.assert_close(bound, logits, rtol=1e-9, atol=1e-9)
        for norm, eps in [("linf", 2 / 255), ("l2", 0.3), ("l1", 2.0), ("l0", 2.0)][: 1 if method == "crown" else 4]:
            lower, upper = bounds(net, Lp(norm, eps), method, x=x)
            with torch.no_grad():
                tried = net(threat_points(x[0], norm, eps, 100, torch.Generator().manual_seed(0)))
            assert (lower - 1e-9 <= tried).all()
            assert (tried <= upper + 1e-9).all()


@pytest.mark.slow
@pytest.mark.parametrize(("eps", "share", "attacked"), [(1 / 255, 0.5716, 0.6224), (2 / 255, 0.2688, 0.5482)])
def test_crown_on_a_residual_net_meets_its_published_share(shared_data, eps, share, attacked):
    count = 100
    net = resnet_2b(shared_data)
    x, y = cifar(shared_data, count)
    found = CROWN()(net, x, y, Lp("linf", eps), batch_size=20)
    width = 3 * (share * (1 - share) / count) ** 0.5
    proven = found.certified.double().mean().item()
    assert share - width <= proven <= attacked + width
    fallen = PGD(steps=20)(net, x, y, Lp("linf", eps)).success
    assert not (fallen & found.certified).any()


@pytest.mark.slow
def test_methods_on_an_adversarially_trained_net_at_a_large_radius(shared_data, mnist):
    """linf 0.3, first 200 images: CROWN-IBP 0, CROWN about 1.5 %, alpha-CROWN (last walk) about 4.5 %."""
    net = load(small(16, 32, 100), shared_data / "nets" / "mnist_small_adv.pth")
    x, y = (t[:200] for t in mnist)
    threat = Lp("linf", 0.3)
    shares = [c(net, x, y, threat, batch_size=50).certified.double().mean().item() for c in (CROWNIBP(), CROWN())]
    assert shares[0] == 0
    assert 0.01 <= shares[1] <= 0.03
    alpha = AlphaCROWN(steps=40)(net, x, y, threat, batch_size=50).certified
    assert 0.03 <= alpha.double().mean().item() <= 0.08
    assert not (alpha & PGD(steps=40)(net, x, y, threat).success).any()


def test_an_undefended_resnet_20_keeps_its_logits(shared_data, kinds):
    net = load(kinds["ResNet"]((16, 32, 64), 3), shared_data / "nets" / "cifar_resnet20.th")
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    lower, upper = bounds(net, (x, x))
    torch.testing.assert_close(lower, net(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(upper, net(x), rtol=1e-4, atol=1e-4)
