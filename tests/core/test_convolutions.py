"""The gradient of a net's first convolution: PyTorch's own, up to rounding, and only where it is sought alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from robustbench_lite.attacks import PGD
from robustbench_lite.core import convolutions
from robustbench_lite.core.convolutions import image_gradients
from robustbench_lite.core.threats import Lp

SHAPES = [
    (kernel, stride, padding, dilation)
    for kernel, stride, padding, dilation in itertools.product(((1, 1), (3, 3), (4, 3)), (1, 2, 3), (0, (2, 1)), (1, 2))
]


def frozen(*args: Any, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(*args, **kwargs).double().requires_grad_(False)


def images(channels: int = 3) -> Tensor:
    return torch.rand(7, channels, 17, 14, dtype=torch.float64).requires_grad_()


def taken_over(answer: Tensor) -> bool:
    """Say whether the gradient is ours."""
    names, rest = set[str](), [answer.grad_fn]
    while rest:
        node: Any = rest.pop()
        if node is not None:
            names.add(type(node).__name__)
            rest += [parent for parent, _ in node.next_functions]
    return "_ConvolutionBackward" in names


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), SHAPES)
@pytest.mark.parametrize("values", [convolutions.VALUES, 900])  # 900: the batch is cut
def test_it_is_pytorchs_gradient(
    monkeypatch: pytest.MonkeyPatch, kernel: Any, stride: int, padding: Any, dilation: int, values: int
) -> None:
    monkeypatch.setattr(convolutions, "VALUES", values)
    net, x = frozen(3, 5, kernel, stride, padding, dilation), images()
    expected = net(x)
    with image_gradients(x):
        found = net(x)
    weights = torch.randn_like(expected)
    assert taken_over(found)
    assert torch.equal(found, expected)
    ours, theirs = (torch.autograd.grad(answer, x, weights)[0] for answer in (found, expected))
    assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_it_can_be_differentiated_again() -> None:
    net, x = frozen(1, 3, 3, padding=1), torch.rand(2, 1, 5, 5, dtype=torch.float64, requires_grad=True)

    def answers(x: Tensor) -> Tensor:
        with image_gradients(x):
            return net(x).tanh()

    assert torch.autograd.gradcheck(answers, x)
    assert torch.autograd.gradgradcheck(answers, x)


def test_a_net_that_differentiates_inside_is_answered_as_before() -> None:
    net, x = frozen(2, 3, 3), images(2)

    def slopes(x: Tensor) -> Tensor:
        return torch.vmap(torch.func.grad(lambda one: net(one.unsqueeze(0)).square().sum()))(x)

    with image_gradients(x):
        found = slopes(x)
    assert_close(found, slopes(x))
    assert_close(torch.autograd.grad(found.sum(), x)[0], torch.autograd.grad(slopes(x).sum(), x)[0])


def test_it_is_left_alone_where_it_is_not_sought_alone() -> None:
    x = images()
    trained = nn.Conv2d(3, 4, 3).double()
    biased = frozen(3, 4, 3)
    assert biased.bias is not None
    biased.bias.requires_grad_(True)
    others = [
        trained,
        biased,
        frozen(3, 6, 3, groups=3),
        frozen(3, 4, 3, padding="same"),
        frozen(3, 4, 3, padding=1, padding_mode="circular", groups=1).requires_grad_(True),
    ]
    with image_gradients(x):
        assert not any(taken_over(net(x)) for net in others)
        assert not taken_over(frozen(8, 4, 3)(images(8)))
        with torch.autocast("cpu"):
            assert not taken_over(frozen(3, 4, 3).float()(x.float()))
        with torch.no_grad():
            assert frozen(3, 4, 3)(x).grad_fn is None
    assert not taken_over(frozen(3, 4, 3)(x))


@pytest.mark.parametrize("geometry", [(2, 1, 1), ((2, 2), "valid", (1, 1)), (2, (1, 1), (1, 1))])
def test_calls_of_the_function_itself_are_answered(geometry: tuple[Any, ...]) -> None:
    x, weight = images(), torch.rand(4, 3, 3, 3, dtype=torch.float64)
    expected = torch.conv2d(x, weight, None, *geometry, 1)
    with image_gradients(x):
        assert torch.equal(torch.conv2d(x, weight, None, *geometry, 1), expected)
        assert torch.equal(torch.conv2d(x, weight, stride=2, padding=1), torch.conv2d(x, weight, None, 2, 1))


def test_the_parameters_of_a_net_that_trains_get_their_gradients() -> None:
    net, x = nn.Conv2d(3, 4, 3).double(), images()
    with image_gradients(x):
        net(x).sum().backward()
    assert net.weight.grad is not None
    assert float(net.weight.grad.abs().sum()) > 0


def test_attacks_use_it_and_leave_the_parameters_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    ours = convolutions.fold

    def spied(*args: Any) -> Tensor:
        calls.append(args)
        return ours(*args)

    monkeypatch.setattr(convolutions, "fold", spied)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)).eval()
    x = torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        y = net(x).argmax(dim=1)
    PGD(steps=3)(net, x, y, Lp("linf", 0.001))
    assert len(calls) == 3
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
