"""Nets that others trained run here as they did there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from robustbench_lite.data import load_data
from robustbench_lite.models import Normalize, SmallCNN, create_model, load_weights

CIFAR_MEAN = [v / 255 for v in (125.3, 123.0, 113.9)]
CIFAR_STD = [v / 255 for v in (63.0, 62.1, 66.7)]


@torch.no_grad()
def accuracy(model: nn.Module, name: str, folder: Path) -> float:
    data = load_data(name, data_dir=folder).head(1000)
    return (model.eval()(data.images).argmax(1) == data.labels).double().mean().item()


@pytest.mark.parametrize(
    ("file", "published"), [("mnist_small_wong_kolter.pth", 0.9820), ("mnist_small_adv.pth", 0.9633)]
)
def test_the_small_mnist_nets(shared_data: Path, file: str, published: float) -> None:
    """The figures are those of 10,000 images; 1,000 of them differ by two standard deviations, 0.013, at most."""
    model = create_model("small_cnn", weights=shared_data / "nets" / file)
    assert accuracy(model, "mnist", shared_data) == pytest.approx(published, abs=0.013)


def test_the_small_cifar_net(shared_data: Path) -> None:
    net = SmallCNN(in_channels=3, image_size=32)
    load_weights(net, shared_data / "nets" / "cifar_small_adv.pth")
    wrapped = nn.Sequential(Normalize(CIFAR_MEAN, CIFAR_STD), net)
    assert accuracy(wrapped, "cifar10", shared_data) == pytest.approx(0.6565, abs=0.03)
    inside = SmallCNN(in_channels=3, image_size=32, mean=CIFAR_MEAN, std=CIFAR_STD)
    inside.load_state_dict(net.state_dict(), strict=False)
    x = load_data("cifar10", data_dir=shared_data).head(5).images
    assert torch.equal(inside.eval()(x), wrapped.eval()(x))


def test_a_net_of_another_shape_is_refused(shared_data: Path) -> None:
    with pytest.raises(ValueError, match="does not fit SmallCNN: missing"):
        load_weights(SmallCNN(), shared_data / "nets" / "mnist_ibp.pth")
