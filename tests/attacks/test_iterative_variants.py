"""Momentum, diverse inputs, smoothed gradients and second-order directions against what their papers write down."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch

from robustbench_lite.attacks import (
    DIFGSM,
    FGSM,
    MIFGSM,
    TIFGSM,
    Autograd,
    InputDiversity,
    NoiseAveraged,
    PowerIteration,
    SecondOrder,
    TranslationInvariant,
    resize_and_pad,
)
from robustbench_lite.core.goals import Untargeted
from robustbench_lite.core.losses import cross_entropy, margin
from robustbench_lite.core.models import predict
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp


def gradient(net, x, y):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(cross_entropy(net(leaf), Untargeted(y)).sum(), leaf)[0]


def ask(estimator, model, x, y, loss=cross_entropy):
    rows = torch.arange(len(x))
    with Oracle(model, x, Untargeted(y), Lp("linf", 0.3), stop="never") as oracle:
        return estimator(oracle, x, rows, loss, Streams.from_generator(None, rows)), oracle


def test_momentum_is_dongs_recursion(net, images):
    y = predict(net, images)
    x, g, eps, steps = images, torch.zeros_like(images), 0.2, 4
    for _ in range(steps):
        slope = gradient(net, x, y)
        g = 0.9 * g + slope / slope.abs().sum(dim=(1, 2, 3), keepdim=True)
        x = (x + eps / steps * g.sign()).clamp(images - eps, images + eps).clamp(0, 1)
    result = MIFGSM(steps=steps, momentum=0.9)(net, images, y, Lp("linf", eps), stop="never")
    lower = cross_entropy(net(result.x_adv), Untargeted(y)) >= cross_entropy(net(x), Untargeted(y)) - 1e-9
    same = (result.x_adv - x).flatten(1).abs().amax(dim=1) < 1e-9
    assert lower.all()
    assert same.sum() >= 6  # the others had a better iterate on the way


def by_hand(image, height, top, left, canvas, fill):
    """Bilinear resize to `height` pixels a side (pixel centres, edges against padding), pad, and look back through."""
    side = image.shape[0]
    padded = np.pad(image, 1, constant_values=fill)
    places = (np.arange(side) + 0.5) * canvas / side
    rows, columns = ((places - start) * side / height - 0.5 for start in (top, left))
    grid = np.meshgrid(rows + 1, columns + 1, indexing="ij")
    return scipy.ndimage.map_coordinates(padded, grid, order=1, mode="nearest")


@pytest.mark.parametrize("draws", [(0.0, 0.0, 0.0), (0.999, 0.5, 0.999), (0.4, 0.7, 0.2)])
def test_resize_and_pad_is_bilinear_sampling_through_the_padded_image(draws):
    side, scale, fill = 10, 1.3, 0.5
    image = torch.rand(1, 1, side, side, dtype=torch.float64)
    canvas = 13
    height = side + int(draws[0] * (canvas - side))
    top, left = (int(draw * (canvas - height + 1)) for draw in draws[1:])
    out = resize_and_pad(image, torch.tensor([draws], dtype=torch.float64), scale, fill)
    expected = by_hand(image[0, 0].numpy(), height, top, left, canvas, fill)
    assert np.allclose(out[0, 0].numpy(), expected, atol=1e-12)


def test_diversity_changes_images_as_often_as_asked_each_by_its_own_draw(net, images):
    y = predict(net, images)
    never, _ = ask(InputDiversity(probability=0.0, scale=1.4), net, images, y)
    assert torch.allclose(never, gradient(net, images, y))
    always, oracle = ask(InputDiversity(probability=1.0, scale=1.4), net, images, y)
    assert ((always - never).flatten(1).abs().amax(dim=1) > 1e-6).sum() >= 11
    assert (oracle.forwards == 2).all()
    assert (oracle.backwards == 1).all()
    alone, _ = ask(InputDiversity(probability=1.0, scale=1.4), net, images[:1], y[:1])
    assert torch.allclose(alone, always[:1])


def test_translation_invariance_is_a_convolution_with_the_originals_window(net, images):
    y = predict(net, images)
    smooth, _ = ask(TranslationInvariant(Autograd(), kernel_size=5), net, images, y)
    window = scipy.stats.norm.pdf(np.linspace(-3, 3, 5))
    window = np.outer(window, window) / window.sum() ** 2
    plain = gradient(net, images, y)
    for one, other in zip(smooth, plain, strict=True):
        expected = scipy.ndimage.convolve(other[0].numpy(), window, mode="constant")
        assert np.allclose(one[0].numpy(), expected, atol=1e-12)
    exact, _ = ask(TranslationInvariant(Autograd(), kernel_size=1), net, images, y)
    assert torch.allclose(exact, plain)


def quadratic(hessian, slope=None):
    def model(x):
        flat = x.flatten(1) - 0.5
        score = 0.5 * (flat @ hessian * flat).sum(dim=1) + (0 if slope is None else flat @ slope)
        return torch.stack([torch.full_like(score, 1e3), score], dim=1)  # far from any success

    return model


@pytest.mark.parametrize("negative", [False, True])
def test_power_iteration_finds_the_top_eigenvector_even_beside_a_larger_negative_one(negative):
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64, generator=g)).Q
    values = torch.tensor([-6.0 if negative else 0.3, 4.0, 1, 0.5, 0.2, 0.1, -0.1, -0.2, -0.5], dtype=torch.float64)
    hessian = basis @ torch.diag(values) @ basis.T
    x = torch.full((4, 1, 3, 3), 0.5, dtype=torch.float64)  # the gradient vanishes here
    y = torch.zeros(4, dtype=torch.int64)
    found, oracle = ask(PowerIteration(60), quadratic(hessian), x, y, margin)
    assert (found.flatten(1) @ basis[:, 1]).abs().min() > 0.999
    assert (oracle.forwards == 61).all()
    assert (oracle.backwards == 121).all()


def test_a_flat_hessian_leaves_the_gradient_and_a_slope_chooses_the_side():
    x, y = torch.full((2, 1, 3, 3), 0.5, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    slope = torch.arange(9.0, dtype=torch.float64) - 3
    found, _ = ask(PowerIteration(4), quadratic(torch.zeros(9, 9).double(), slope), x, y, margin)
    assert torch.allclose(found.flatten(1), slope.expand(2, -1))
    hessian = torch.diag(torch.tensor([5.0] + [0.1] * 8, dtype=torch.float64))
    for sign in (1.0, -1.0):
        found, _ = ask(PowerIteration(40), quadratic(hessian, sign * torch.ones(9).double()), x, y, margin)
        assert (sign * found[:, 0, 0, 0] > 0.99).all()


def test_noise_averaged_gradients_are_those_of_the_smoothed_loss():
    """A quadratic's smoothed gradient is its gradient; the mean over n draws is off by |H| sigma / sqrt(n)."""
    g = torch.Generator().manual_seed(0)
    hessian = torch.randn(9, 9, dtype=torch.float64, generator=g)
    hessian = hessian + hessian.T
    x = torch.rand(3, 1, 3, 3, dtype=torch.float64, generator=g)
    y = torch.zeros(3, dtype=torch.int64)
    found, oracle = ask(NoiseAveraged(400, sigma=0.5), quadratic(hessian), x, y, margin)
    expected = (x.flatten(1) - 0.5) @ hessian
    error = (found.flatten(1) - expected).norm(dim=1)
    assert (error < 3 * 0.5 * hessian.norm() / 20).all()
    assert (oracle.forwards == 401).all()
    assert (oracle.backwards == 400).all()


def test_second_order_leaves_a_point_where_the_gradient_vanishes():
    hessian = torch.diag(torch.tensor([2.0, -1, -1, -1, -1, -1, -1, -1, -1], dtype=torch.float64))

    def model(x):
        return quadratic(hessian)(x) - torch.tensor([1e3 - 0.02, 0.0])

    x = torch.full((3, 1, 3, 3), 0.5, dtype=torch.float64)
    y, threat = torch.zeros(3, dtype=torch.int64), Lp("l2", 0.4)
    assert not MIFGSM()(model, x, y, threat).success.any()
    assert SecondOrder(estimator=PowerIteration(), loss="margin")(model, x, y, threat).success.all()
    assert SecondOrder(estimator=NoiseAveraged(sigma=0.1), loss="margin")(model, x, y, threat).success.all()


def test_settings_reach_the_loop_with_the_papers_defaults():
    assert MIFGSM().ascent().momentum == 1.0
    assert MIFGSM().ascent().path == 1.0
    assert DIFGSM(momentum=0.7).ascent().momentum == 0.7
    assert DIFGSM(probability=0.3, scale=1.2).ascent().estimator == InputDiversity(0.3, 1.2)
    assert pytest.approx(DIFGSM().ascent().path * 16 / 255) == (20 * 16 / 255 / 20 * 1.25)
    assert TIFGSM().ascent().estimator == TranslationInvariant(Autograd(), 15)
    assert TIFGSM(diversity=True, kernel_size=7).ascent().estimator == TranslationInvariant(InputDiversity(), 7)
    assert SecondOrder().ascent().estimator == NoiseAveraged(10, 0.7)
    assert FGSM(random_start=True).ascent().path == 1.25  # Wong, Rice and Kolter 2020
    assert FGSM().ascent().path == 1.0


def test_bad_values_are_named():
    for build, message in [
        (lambda: MIFGSM(momentum=-1), "momentum must be >= 0"),
        (lambda: DIFGSM(probability=1.5), r"probability must be in \[0, 1\]"),
        (lambda: DIFGSM(scale=0.9), "scale must be at least 1"),
        (lambda: TIFGSM(kernel_size=4), "odd number"),
        (lambda: TranslationInvariant(deviations=0), "deviations must be > 0"),
        (lambda: NoiseAveraged(samples=0), "samples must be a whole number"),
        (lambda: NoiseAveraged(sigma=0), "sigma must be > 0"),
        (lambda: PowerIteration(1), "at least 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            build()
