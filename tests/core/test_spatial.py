from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from scipy.ndimage import gaussian_filter, map_coordinates
from torchvision.transforms import InterpolationMode

from robustbench_lite.core.rng import Streams
from robustbench_lite.core.spatial import Deformation, RotationTranslation


def picture(n=4, channels=2, height=9, width=9):
    return torch.rand(n, channels, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def streams(n):
    return Streams.from_generator(None, torch.arange(n))


def test_no_change_is_exactly_the_image():
    x = picture(height=8, width=11)
    for threat in (RotationTranslation(), Deformation(2.0)):
        assert torch.allclose(threat.apply(x, threat.origin(x)), x, atol=1e-14)
        assert (threat.distance(threat.origin(x), x) == 0).all()


def test_shift_moves_right_and_down_and_brings_in_black():
    x = picture(n=1)
    out = RotationTranslation().apply(x, torch.tensor([[0.0, 2.0, 1.0]], dtype=torch.float64))
    expected = torch.zeros_like(x)
    expected[..., 1:, 2:] = x[..., :-1, :-2]
    assert torch.allclose(out, expected, atol=1e-12)


def test_quarter_turn_is_counter_clockwise():
    x = picture(n=1)
    out = RotationTranslation(degrees=90).apply(x, torch.tensor([[90.0, 0.0, 0.0]], dtype=torch.float64))
    assert torch.allclose(out, torch.rot90(x, 1, dims=(2, 3)), atol=1e-12)


def test_agrees_with_torchvision_on_odd_and_even_sizes():
    for size in (8, 9):
        x = picture(n=1, height=size, width=size)
        ours = RotationTranslation().apply(x, torch.tensor([[17.0, 2.0, -1.0]], dtype=torch.float64))
        theirs = TF.affine(x, -17.0, [2, -1], 1.0, [0.0, 0.0], interpolation=InterpolationMode.BILINEAR)
        assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("shape", [(9, 9), (6, 11)])
def test_rotations_agree_with_an_independent_interpolation(shape):
    """Pixel (i, j) of a picture turned by a about its centre c and then shifted reads R(-a) (p - c - shift) + c."""
    x = picture(n=3, height=shape[0], width=shape[1])
    point = torch.tensor([[25.0, 1.5, -2.25], [-30.0, -3.0, 3.0], [7.0, 0.0, 0.6]], dtype=torch.float64)
    images = RotationTranslation().apply(x, point).numpy()
    centre = [(side - 1) / 2 for side in shape]
    for image, clean, (degrees, right, down) in zip(images, x.numpy(), point.tolist(), strict=True):
        a = math.radians(degrees)
        i, j = np.indices(shape)
        dy, dx = i - centre[0] - down, j - centre[1] - right
        rows, columns = centre[0] + math.sin(a) * dx + math.cos(a) * dy, centre[1] + math.cos(a) * dx - math.sin(a) * dy
        for channel in range(2):
            expected = map_coordinates(clean[channel], [rows, columns], order=1, mode="grid-constant")
            assert np.allclose(image[channel], expected, atol=1e-12)


@pytest.mark.parametrize("smoothness", [0, 0.7, 2.0])
def test_deformations_agree_with_an_independent_interpolation(smoothness):
    x, threat = picture(n=2, height=8, width=11), Deformation(3.0, smoothness)
    point = threat.random_point(x, streams(2))
    i, j = np.indices((8, 11))
    for n in range(2):
        flow = point[n].numpy()
        if smoothness:
            reach = math.ceil(3 * smoothness)
            flow = np.stack([gaussian_filter(f, smoothness, mode="constant", radius=reach) for f in flow])
        assert np.allclose(threat.flow(point)[n], flow, atol=1e-12)
        for channel in range(2):
            expected = map_coordinates(x[n, channel].numpy(), [i + flow[1], j + flow[0]], order=1, mode="nearest")
            assert np.allclose(threat.apply(x, point)[n, channel], expected, atol=1e-12)


def test_a_deformation_without_a_budget_asks_for_the_nearest():
    x, threat = picture(n=2), Deformation(None)
    assert threat.size is None
    assert threat.contains(torch.full((2, 2, 9, 9), 50.0), x).all()
    assert not threat.contains(torch.full((2, 2, 9, 9), float("nan")), x).any()
    for call in (lambda: threat.project(threat.origin(x), x), lambda: threat.random_point(x, streams(2))):
        with pytest.raises(ValueError, match="needs a budget"):
            call()


def test_black_is_the_lower_bound():
    x = torch.full((1, 1, 5, 5), 0.5)
    out = RotationTranslation(bounds=(-1.0, 1.0)).apply(x, torch.tensor([[0.0, 3.0, 0.0]]))
    assert out[0, 0, 0, 0] == -1


@pytest.mark.parametrize("threat", [RotationTranslation(20, 2), Deformation(1.5), Deformation(0.7, smoothness=0)])
def test_random_points_are_inside_and_projection_keeps_them(threat):
    x = picture(n=30)
    point = threat.random_point(x, streams(30))
    assert threat.contains(point, x).all()
    assert torch.allclose(threat.project(point, x), point)
    assert threat.contains(threat.project(10 * point, x), x).all()
    assert not threat.contains(20 * point + 20, x).any()
    assert not threat.contains(point * float("nan"), x).any()
    image = threat.apply(x, point)
    assert image.shape == x.shape
    assert image.min() >= 0
    assert image.max() <= 1


def test_constant_flow_is_a_shift_away_from_the_border():
    x = picture(n=1, height=12, width=12)
    point = torch.zeros(1, 2, 12, 12, dtype=torch.float64)
    point[:, 0] = 1.0  # read one pixel to the right
    out = Deformation(1.0, smoothness=0).apply(x, point)
    assert torch.allclose(out[..., :-1], x[..., 1:], atol=1e-12)
    assert torch.allclose(out[..., -1], x[..., -1], atol=1e-12)  # the edge repeats


def test_distance_of_a_deformation_is_its_largest_displacement():
    threat = Deformation(5.0)
    x, point = picture(n=3), torch.randn(3, 2, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    largest = threat.flow(point).pow(2).sum(dim=1).sqrt().amax(dim=(1, 2))
    assert torch.allclose(threat.distance(point, x), largest)
    assert (threat.distance(point, x) < point.norm(dim=1).amax(dim=(1, 2))).all()  # smoothing never lengthens


@pytest.mark.parametrize("threat", [RotationTranslation(20, 2), Deformation(0.7)])
def test_the_steepest_point_beats_every_point_of_the_threat(threat):
    x = picture(n=20)
    g = torch.randn(threat.origin(x).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    best = threat.steepest(g, x)
    assert torch.allclose(threat.project(best, x), best, atol=1e-12)
    for point in (threat.random_point(x, streams(20)), threat.project(30 * g, x), threat.project(-g, x)):
        assert ((best * g).flatten(1).sum(dim=1) >= (point * g).flatten(1).sum(dim=1) - 1e-12).all()
    assert torch.allclose(threat.steepest(1e-200 * g, x), best)
    assert (threat.steepest(0 * g, x) == 0).all()


def test_gradient_reaches_the_parameters():
    x = picture(n=2)
    for threat in (RotationTranslation(), Deformation(2.0)):
        start = threat.random_point(x, streams(2)).requires_grad_()
        torch.autograd.gradcheck(lambda p, t=threat: t.apply(x, p), (start,), atol=1e-5)


def test_budgets_are_checked():
    with pytest.raises(ValueError, match="degrees must be >= 0"):
        RotationTranslation(degrees=-1)
    with pytest.raises(ValueError, match="finite"):
        Deformation(float("inf"))
