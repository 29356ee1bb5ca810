"""What `bounds` refuses, and how it says so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustbench_lite.certify import bounds
from robustbench_lite.certify.precision import full_precision
from robustbench_lite.core.spatial import RotationTranslation
from robustbench_lite.core.threats import Lp

X = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize(
    ("box", "told"),
    [
        ((X + 0.1, X), r"lower must not exceed upper; at \(0, 0, 0, 0\)"),
        ((X, X[:2]), "agree in shape"),
        ((X, X.double()), "agree in shape, dtype"),
        ((X * float("nan"), X), "finite"),
        ((X, X + float("inf")), "finite"),
        ((X[0], X[0]), r"\(B, C, H, W\)"),
    ],
)
def test_wrong_boxes(linear, box, told):
    with pytest.raises(ValueError, match=told):
        bounds(linear, box)


def test_wrong_kinds(linear):
    with pytest.raises(TypeError, match="floating-point"):
        bounds(linear, (X.int(), X.int()))
    with pytest.raises(TypeError, match="threat or a box"):
        bounds(linear, X)


def test_threats_need_images_and_boxes_do_not(linear):
    with pytest.raises(ValueError, match="x="):
        bounds(linear, Lp("linf", 0.1))
    with pytest.raises(ValueError, match="box"):
        bounds(linear, (X, X), x=X)


@pytest.mark.parametrize("threat", [Lp("l0", 2), RotationTranslation(degrees=10, pixels=1)])
def test_threats_without_a_rule(linear, threat):
    with pytest.raises(ValueError, match="linf, l2, l1"):
        bounds(linear, threat, x=X)


def test_a_threat_without_eps(linear):
    with pytest.raises(ValueError, match="eps"):
        bounds(linear, Lp("linf", None), x=X)


def test_unknown_method_and_linear_coefficients(linear):
    with pytest.raises(ValueError, match="did you mean 'ibp'"):
        bounds(linear, (X, X), method="ipb")
    with pytest.raises(ValueError, match="coefficients"):
        bounds(linear, (X, X), return_linear=True)


@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 2, 3), (1, 2, 3)])
def test_wrong_specifications(linear, shape):
    with pytest.raises(ValueError, match=r"C must have shape \(S, 3\) or \(3, S, 3\)"):
        bounds(linear, (X, X), C=torch.zeros(shape))


def test_nan_weights_are_named(linear):
    linear[1].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'1\.weight'"):
        bounds(linear, (X, X))


def test_per_sample_specification_is_the_shared_one_expanded(linear):
    C = torch.tensor([[1.0, -1.0, 0.0], [0.5, 0.5, 0.5]])
    shared = bounds(linear, Lp("linf", 0.1), C=C, x=X)
    each = bounds(linear, Lp("linf", 0.1), C=C.expand(3, 2, 3), x=X)
    for a, b in zip(shared, each, strict=True):
        torch.testing.assert_close(a, b)


def test_bounds_are_those_of_eval_mode_and_leave_the_mode_alone():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8, 3))
    in_training = bounds(net, (X, X))[0]
    assert all(module.training for module in net.modules())
    net.eval()
    torch.testing.assert_close(in_training, net(X))


def test_autocast_does_not_coarsen_bounds(linear):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower, _ = bounds(linear, (X, X))
    assert lower.dtype == torch.float32
    torch.testing.assert_close(lower, linear(X))


def test_tf32_is_switched_off_and_restored():
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [setting.fp32_precision for setting in settings]
    with full_precision(torch.device("cuda")):
        assert [setting.fp32_precision for setting in settings] == ["ieee", "ieee"]
    assert [setting.fp32_precision for setting in settings] == before


@pytest.mark.gpu
def test_bounds_on_a_gpu_are_those_of_the_cpu():
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    on_cpu = bounds(net, Lp("l2", 0.1), x=X)
    on_gpu = bounds(net.cuda(), Lp("l2", 0.1), x=X.cuda())
    for a, b in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-5, atol=1e-5)
