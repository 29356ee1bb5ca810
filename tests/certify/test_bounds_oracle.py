"""Bounds against independent computations: dense matrices from basis images, closed forms, printed fixtures."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.certify import bounds
from robustbench_lite.core.threats import Lp


def dense(layer: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """The matrix and offset of an affine layer, one basis image at a time, and the shape of its output."""
    size = int(torch.tensor(shape).prod())
    zero = layer(torch.zeros(1, *shape, dtype=torch.float64))
    columns = [layer(row.reshape(1, *shape)).flatten() for row in torch.eye(size, dtype=torch.float64)]
    offset = zero.flatten()
    return torch.stack(columns, 1) - offset[:, None], offset, tuple(zero.shape[1:])


def image(low: Tensor, high: Tensor, matrix: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Exact interval image by the positive and the negative part of the matrix."""
    up, down = matrix.clamp(min=0), matrix.clamp(max=0)
    return up @ low + down @ high + offset, up @ high + down @ low + offset


def stages(net: list[Callable[[Tensor], Tensor]], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Intervals (flat) through affine layers and monotone activations, told apart by name."""
    shape = tuple(low.shape)
    low, high = low.flatten(), high.flatten()
    for layer in net:
        if layer in (torch.relu, torch.tanh):
            low, high = layer(low), layer(high)
        else:
            matrix, offset, shape = dense(layer, shape)
            low, high = image(low, high, matrix, offset)
    return low, high, shape


@torch.no_grad()
@pytest.mark.parametrize("seed", range(6))
def test_residual_net_with_joins_equals_dense_computation(seed, kinds):
    torch.manual_seed(seed)
    stem = nn.Conv2d(2, 3, 3, stride=1 + seed % 2, padding=1)
    a = nn.Sequential(nn.Conv2d(3, 4, 3, padding=2, dilation=2), nn.BatchNorm2d(4))
    b = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    skip = nn.Conv2d(3, 6, 1, stride=2)
    head = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.LazyLinear(4))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b, self.skip, self.head = stem, a, b, skip, head

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.stem(x))
            joined = self.b(torch.tanh(self.a(h))) - self.skip(h)
            return self.head(torch.relu(joined))

    net = Net()
    net(torch.zeros(2, 2, 6, 6))
    a[1].running_mean.normal_()
    a[1].weight.normal_()
    net = net.double().eval()
    x = torch.rand(2, 6, 6, dtype=torch.float64)
    low, high = (x - 0.1).clamp(min=0), (x + 0.1).clamp(max=1)
    C = torch.tensor([[1.0, -1, 0, 0], [0, 0, 1, -1], [1, 1, 1, 1]], dtype=torch.float64)

    h_low, h_high, shape = stages([stem, torch.relu], low, high)
    h_low, h_high = h_low.reshape(shape), h_high.reshape(shape)
    b_low, b_high, shape = stages([a, torch.tanh, b], h_low, h_high)
    s_low, s_high, _ = stages([skip], h_low, h_high)
    j_low, j_high = torch.relu(b_low - s_high).reshape(shape), torch.relu(b_high - s_low).reshape(shape)
    # pooling is a layer of its own in the interval computation, the elided Linear another
    p_low, p_high, _ = stages([head[0]], j_low, j_high)
    for specification, given in ((torch.eye(4, dtype=torch.float64), None), (C, C)):
        expected = image(p_low, p_high, specification @ head[2].weight, specification @ head[2].bias)
        found = bounds(net, (low[None], high[None]), C=given)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[0], theirs, rtol=1e-9, atol=1e-9)
        single = bounds(net.float(), (low[None].float(), high[None].float()), C=given)
        for ours, theirs in zip(single, expected, strict=True):
            torch.testing.assert_close(ours[0].double(), theirs, rtol=1e-5, atol=1e-5)
        net.double()


@torch.no_grad()
@pytest.mark.parametrize(("norm", "dual"), [("l2", 2.0), ("l1", float("inf"))])
@pytest.mark.parametrize(
    "name",
    ["linear", "conv_stride", "conv_rectangle", "conv_dilation", "conv_groups", "conv_valid", "pad", "normalized",
     "normalized_mlp", "batch_norm_first", "conv_same_even"],
)  # fmt: skip
def test_first_layer_of_a_ball_inside_the_box_is_exact(name, norm, dual, make_net):
    """Up to the first activation the bound is eps times the dual norm of each dense row: nothing is lost."""
    net = make_net(name)
    layers: list[nn.Module] = []
    inner = net.net if hasattr(net, "net") else net
    for layer in inner:
        if isinstance(layer, nn.ReLU):
            break
        layers.append(layer)
    first = nn.Sequential(*layers, nn.Flatten())
    if inner is not net:
        wrapped = type(net)(first).double()
        wrapped.mean, wrapped.std = net.mean, net.std
        first = wrapped
    x = torch.full((1, 2, 6, 6), 0.5, dtype=torch.float64)
    matrix, _, _ = dense(first, (2, 6, 6))
    radius = 0.4 * torch.linalg.vector_norm(matrix, ord=dual, dim=1)
    lower, upper = bounds(first, Lp(norm, 0.4), x=x)
    torch.testing.assert_close(lower, first(x) - radius, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(upper, first(x) + radius, rtol=1e-9, atol=1e-9)


def two_neurons(biases: tuple[float, ...]) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    net[1].weight.data = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    net[1].bias.data = torch.tensor(biases[:2], dtype=torch.float64)
    net[3].weight.data = torch.ones(1, 2, dtype=torch.float64)
    net[3].bias.data = torch.tensor(biases[2:], dtype=torch.float64)
    return net


@pytest.mark.parametrize(
    ("biases", "eps", "clip", "expected"),
    [
        ((0, 0, 0), 0.1, False, (0.6, 1.4)),
        ((0, 0, 0), 0.3, False, (0.1, 2.2)),
        ((0, 0, 0), 0.5, False, (0.0, 3.0)),
        ((0, 0, 0), 0.3, True, (0.2, 2.1)),
        ((0, 0, 0), 0.5, True, (0.0, 2.7)),
        ((-0.6, -0.1, 0.25), 0.1, False, (0.25, 0.95)),
        ((-0.6, -0.1, 0.25), 0.2, False, (0.25, 1.35)),
    ],
)
def test_printed_fixtures(biases, eps, clip, expected):
    net = two_neurons(biases)
    x = torch.tensor([0.5, 0.2], dtype=torch.float64).reshape(1, 1, 1, 2)
    threat = Lp("linf", eps, (0.0, 1.0) if clip else (-9.0, 9.0))
    found = torch.cat(bounds(net, threat, x=x)).flatten()
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_gradients_in_parameters_and_box_agree_with_finite_differences(make_net):
    net = make_net("conv_groups")
    x = 0.3 + 0.4 * torch.rand(2, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    C = torch.tensor([[1.0, -1.0, 0.0]], dtype=torch.float64)
    weight, head = net[0].weight, net[3].weight

    def in_parameters(_first: Tensor, _last: Tensor) -> Tensor:
        return torch.cat([torch.cat(bounds(net, Lp(norm, 0.05), C=C, x=x)) for norm in ("linf", "l2", "l1")])

    def in_box(lower: Tensor, upper: Tensor) -> Tensor:
        return torch.cat(bounds(net, (lower, upper), C=C))

    assert torch.autograd.gradcheck(in_parameters, (weight, head), fast_mode=True)
    box = (x[:1, :, :, :] - 0.05).requires_grad_(), (x[:1] + 0.05).requires_grad_()
    assert torch.autograd.gradcheck(in_box, box)
