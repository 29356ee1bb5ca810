from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import fx, nn

from robustbench_lite.core import registry
from robustbench_lite.models import MLP, LeNet, Normalize, PreActResNet18, SmallCNN, WideResNet, create_model

SMALL: list[tuple[type[nn.Module], dict[str, Any], tuple[int, ...]]] = [
    (MLP, {"image_size": 8}, (1, 8, 8)),
    (MLP, {"in_channels": 3, "image_size": (6, 9), "hidden": []}, (3, 6, 9)),
    (SmallCNN, {"image_size": 8}, (1, 8, 8)),
    (SmallCNN, {}, (1, 28, 28)),
    (SmallCNN, {"in_channels": 3, "image_size": 32, "num_classes": 7}, (3, 32, 32)),
    (SmallCNN, {"image_size": (9, 14)}, (1, 9, 14)),
    (SmallCNN, {"image_size": 11}, (1, 11, 11)),
    (LeNet, {}, (1, 28, 28)),
    (LeNet, {"in_channels": 2, "image_size": (10, 7)}, (2, 10, 7)),
    (PreActResNet18, {"width": 4}, (3, 32, 32)),
    (PreActResNet18, {"width": 4, "in_channels": 1, "num_classes": 3}, (1, 17, 12)),
    (WideResNet, {"depth": 10, "widen_factor": 1}, (3, 32, 32)),
    (WideResNet, {"depth": 16, "widen_factor": 1, "in_channels": 1, "dropout": 0.3}, (1, 8, 8)),
]


def images(*shape: int) -> torch.Tensor:
    return torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("net", "options", "shape"), SMALL)
@torch.no_grad()
def test_logits_of_every_net(net: type[nn.Module], options: dict[str, Any], shape: tuple[int, ...]) -> None:
    channels = shape[0]
    model = net(**options, mean=[0.3] * channels, std=[0.2] * channels).eval()
    x = images(*shape)
    logits = model(x)
    assert logits.shape == (3, options.get("num_classes", 10))
    assert torch.allclose(logits[1:2], model(x[1:2]), atol=1e-5)  # each image is its own
    traced = fx.symbolic_trace(model)
    assert torch.equal(traced(x), logits)
    assert torch.equal(traced(x[:1]), model(x[:1]))  # no batch size is baked in
    assert torch.equal(copy.deepcopy(model)(x), logits)
    plain = net(**options).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("normalize.")})
    assert torch.allclose(plain((x - 0.3) / 0.2), logits, atol=1e-4)


def conv(inputs: int, outputs: int, kernel: int, bias: bool = True) -> int:
    return inputs * outputs * kernel**2 + (outputs if bias else 0)


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def residual(depth_of_stage: int, widths: list[int], first: int) -> int:
    """Convolutions without biases, batch norms of two numbers a channel, 1x1 shortcuts where the width changes."""
    total, before = 0, first
    for stage, width in enumerate(widths):
        for block in range(depth_of_stage):
            total += 2 * before + conv(before, width, 3, False) + 2 * width + conv(width, width, 3, False)
            if before != width or (block == 0 and stage > 0):
                total += conv(before, width, 1, False)
            before = width
    return total + 2 * before


def wide(blocks: int) -> int:
    return conv(3, 16, 3, False) + residual(blocks, [160, 320, 640], 16) + linear(640, 10)


COUNTS = [
    ("small_cnn", (1, 28), conv(1, 16, 4) + conv(16, 32, 4) + linear(32 * 7 * 7, 100) + linear(100, 10), 166_406),
    ("lenet", (1, 28), conv(1, 32, 5) + conv(32, 64, 5) + linear(64 * 7 * 7, 1024) + linear(1024, 10), 3_274_634),
    ("mlp", (1, 28), linear(784, 64) + linear(64, 64) + linear(64, 10), 55_050),
    (
        "preact_resnet18",
        (3, 32),
        conv(3, 64, 3, False) + residual(2, [64, 128, 256, 512], 64) + linear(512, 10),
        11_172_170,
    ),
    (
        "wide_resnet_28_10",
        (3, 32),
        wide(4),
        36_479_194,
    ),
    (
        "wide_resnet_34_10",
        (3, 32),
        wide(5),
        46_160_474,
    ),
]


@pytest.mark.parametrize(("name", "shape", "computed", "published"), COUNTS)
def test_as_many_parameters_as_published(name: str, shape: tuple[int, int], computed: int, published: int) -> None:
    with torch.device("meta"):  # shapes without memory: 46 million numbers need not be drawn
        model = create_model(name, in_channels=shape[0], image_size=shape[1], num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == computed == published


def test_every_config_of_the_group_was_counted() -> None:
    others = {"custom", "onnx", "robustbench"}  # the user's own
    others |= {"class_vaes"}  # tests/models/test_class_vaes.py counts the autoencoders'
    assert {name for name, *_ in COUNTS} | others == set(registry.groups("model"))


def test_a_wide_net_starts_with_the_variance_of_its_source() -> None:
    torch.manual_seed(0)
    model = WideResNet(10, 4)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


def test_normalize_is_the_formula_and_part_of_the_state() -> None:
    layer, x = Normalize([0.1, 0.2], [0.5, 0.25]), images(2, 4, 5)
    expected = torch.stack([(x[:, 0] - 0.1) / 0.5, (x[:, 1] - 0.2) / 0.25], dim=1)
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert set(layer.state_dict()) == {"mean", "std"}
    assert not list(layer.parameters())
    assert layer.double()(x.double()).dtype == torch.float64
    assert torch.equal(fx.symbolic_trace(layer.float())(x), layer(x))


def test_a_slice_of_a_net_is_a_plain_sequential() -> None:
    model = SmallCNN(image_size=8, mean=[0.0], std=[1.0])
    assert type(model[:-1]) is nn.Sequential
    assert model[:-1](images(1, 8, 8)).shape == (3, 100)
    assert isinstance(model[-1], nn.Linear)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SmallCNN(image_size=7), "at least 8x8, got image_size 7"),
        (lambda: LeNet(image_size=(28, 3)), "at least 4x4"),
        (lambda: WideResNet(depth=27), r"depth must be 6 n \+ 4"),
        (lambda: WideResNet(depth=4), r"depth must be 6 n \+ 4"),
        (lambda: SmallCNN(mean=[0.5]), "mean and std go together"),
        (lambda: SmallCNN(in_channels=3, mean=[0.5], std=[0.5]), "need 3 values, one a channel, got 1"),
        (lambda: Normalize([0.5], [0.0]), "std must be > 0"),
        (lambda: Normalize([0.5], [0.1, 0.1]), "one value a channel each, got 1 and 2"),
    ],
)
def test_what_a_net_refuses(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
