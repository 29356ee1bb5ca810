from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp

NORMS = ["linf", "l2", "l1", "l0"]
RADIUS = {"linf": 0.2, "l2": 0.7, "l1": 1.5, "l0": 3}
ORDER = {"linf": float("inf"), "l2": 2, "l1": 1}


def batch(n=40, shape=(2, 3, 3), dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *shape, dtype=dtype, generator=g)
    return x, x + torch.randn(n, *shape, dtype=dtype, generator=g)


def streams(n, seed=0, label=0):
    return Streams.from_generator(torch.Generator().manual_seed(seed), torch.arange(n)).fork(label)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_is_feasible_and_idempotent(norm):
    x, far = batch()
    threat = Lp(norm, RADIUS[norm])
    near = threat.project(far, x)
    assert threat.contains(near, x).all()
    assert torch.allclose(threat.project(near, x), near, atol=1e-12)
    assert torch.equal(threat.project(x, x), x)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_projection_is_the_nearest_point(norm):
    """Variational inequality: <far - near, z - near> <= 0 for every z of the convex set."""
    x, far = batch()
    threat = Lp(norm, RADIUS[norm])
    near = threat.project(far, x)
    for label in range(200):
        z = threat.random_point(x, streams(len(x), label=label))
        assert ((far - near) * (z - near)).flatten(1).sum(dim=1).max() <= 1e-9


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 6.0))
def test_l1_projection_solves_its_scalar_equation(seed, eps):
    """Where it is not already inside, the l1 norm equals eps, and all free coordinates moved by the same amount."""
    x, far = batch(n=1, shape=(1, 2, 4), seed=seed)
    d = (Lp("l1", eps).project(far, x) - x).flatten()
    wanted, low, high = (far - x).flatten(), (-x).flatten(), (1 - x).flatten()
    if wanted.clamp(low, high).abs().sum() <= eps:
        assert torch.allclose(d, wanted.clamp(low, high))
        return
    assert d.abs().sum().item() == pytest.approx(eps, rel=1e-9)
    free = (d != 0) & (d > low + 1e-12) & (d < high - 1e-12)
    shift = (wanted - d).abs()[free]
    if len(shift) > 1:
        assert shift.max() - shift.min() < 1e-9


def test_l0_projection_is_the_nearest_point_by_brute_force():
    x, far = batch(n=20, shape=(2, 2, 2))
    near = Lp("l0", 2).project(far, x)
    cut = far.clamp(0, 1)
    for i, (row, column) in itertools.product(range(20), itertools.combinations(range(4), 2)):
        keep = torch.zeros(4, dtype=torch.bool)
        keep[[row, column]] = True
        other = torch.where(keep.reshape(2, 2), cut[i], x[i])
        assert (near[i] - far[i]).norm() <= (other - far[i]).norm() + 1e-12


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_steepest_reaches_the_dual_norm(norm):
    x, g = batch()
    g = g - x
    threat = Lp(norm, 1.0)
    d = threat.steepest(g)
    assert (threat.distance(x + d, x) <= 1 + 1e-12).all()
    dual = torch.linalg.vector_norm(g.flatten(1), ord=ORDER[threat.dual_norm], dim=1)
    assert torch.allclose((d * g).flatten(1).sum(dim=1), dual)


def test_steepest_survives_tiny_and_zero_gradients():
    g = torch.full((1, 1, 4, 4), 1e-30)
    assert Lp("l2", 1.0).steepest(g).norm().item() == pytest.approx(1, rel=1e-6)
    for norm in ("linf", "l2", "l1"):
        assert Lp(norm, 0.5).steepest(torch.zeros(1, 1, 4, 4)).abs().max() == 0


def test_sparse_l1_steps_have_unit_length_and_skip_stuck_coordinates():
    x = torch.tensor([[[[0.0, 0.5], [1.0, 0.5]]]], dtype=torch.float64)
    g = torch.tensor([[[[-9.0, 1.0], [8.0, -2.0]]]], dtype=torch.float64)  # the two largest point out of the box
    d = Lp("l1", 0.5).steepest(g, density=0.5, at=x)
    assert d.flatten().tolist() == [0, 0.5, 0, -0.5]


@pytest.mark.parametrize("norm", NORMS)
def test_points_made_in_float32_lie_inside_without_any_tolerance(norm):
    x, far = batch(n=200, shape=(3, 16, 16), dtype=torch.float32)
    eps = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0, "l0": 9}[norm]
    threat = Lp(norm, eps)
    for point in (threat.project(far, x), threat.random_point(x, streams(200))):
        assert (threat.distance(point, x) <= eps).all()
        assert point.min() >= 0
        assert point.max() <= 1
    assert threat.distance(threat.project(far, x), x).min() > eps * 0.999


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_random_points_are_uniform_in_the_ball(norm):
    """The share of the volume within radius r is (r / eps)^d, so that power of the distance is uniform."""
    n, dims = 3000, 9
    x = torch.full((n, 1, 3, 3), 0.5, dtype=torch.float64)
    point = Lp(norm, 0.4).random_point(x, streams(n))
    share = (Lp(norm, 0.4).distance(point, x) / 0.4) ** dims
    assert stats.kstest(share.numpy(), "uniform").pvalue > 1e-3
    assert (point - x).mean(dim=0).abs().max() < 0.02


def test_random_linf_points_are_uniform_in_each_coordinate():
    x = torch.full((4000, 1, 1, 2), 0.5, dtype=torch.float64)
    d = (Lp("linf", 0.3).random_point(x, streams(4000)) - x).flatten(1).numpy()
    for column in d.T:
        assert stats.kstest(column, "uniform", args=(-0.3, 0.6)).pvalue > 1e-3
    assert abs(np.corrcoef(d.T)[0, 1]) < 0.06


def test_random_l0_points_change_that_many_pixels():
    x = torch.full((100, 3, 5, 5), 0.5, dtype=torch.float64)
    assert (Lp("l0", 4).distance(Lp("l0", 4).random_point(x, streams(100)), x) == 4).all()


def test_l0_by_coordinate_counts_channels_apart():
    x, far = batch(n=20, shape=(3, 2, 2))
    threat = Lp("l0", 4, per="coordinate")
    near = threat.project(far, x)
    assert (threat.distance(near, x) <= 4).all()
    cut = far.clamp(0, 1)
    gain = ((far - x) ** 2 - (far - cut) ** 2).flatten(1)  # what moving a coordinate saves
    best = gain.topk(4, dim=1).values.sum(dim=1)
    saved = ((far - x) ** 2 - (far - near) ** 2).flatten(1).sum(dim=1)
    assert torch.allclose(saved, best)
    assert (threat.distance(threat.random_point(x, streams(20)), x) == 4).all()
    one_pixel = x.clone()
    one_pixel[:, :, 0, 0] = 1 - x[:, :, 0, 0]
    assert (threat.distance(one_pixel, x) == 3).all()
    assert (Lp("l0", 4).distance(one_pixel, x) == 1).all()


def test_one_eps_a_sample():
    x, far = batch(n=3)
    threat = Lp("l2", torch.tensor([0.0, 0.1, 0.5]))
    assert torch.allclose(threat.distance(threat.project(far, x), x), torch.tensor([0.0, 0.1, 0.5]).double(), atol=1e-6)
    assert threat.take(torch.tensor([2])).eps.tolist() == [0.5]
    with pytest.raises(ValueError, match="one value for each of the 2 images"):
        threat.project(far[:2], x[:2])


@pytest.mark.parametrize("norm", NORMS)
def test_box_holds_the_ball(norm):
    x, _ = batch()
    threat = Lp(norm, RADIUS[norm])
    lower, upper = threat.box(x)
    for label in range(20):
        point = threat.random_point(x, streams(len(x), label=label))
        assert (point >= lower - 1e-12).all()
        assert (point <= upper + 1e-12).all()


def test_membership_refuses_nan_and_the_outside_of_the_bounds():
    x = torch.full((3, 1, 2, 2), 0.95)
    point = x.clone()
    point[0, 0, 0, 0] = float("nan")
    point[1, 0, 0, 0] = 1.02
    assert Lp("linf", 0.1).contains(point, x).tolist() == [False, False, True]
    assert Lp("linf", None).contains(point, x).tolist() == [False, False, True]


def test_gradients_are_not_masked_at_the_image_bounds():
    """Regression: since torch 2.15 the gradient of clamp is 0 at the bound, on black and white pixels."""
    x = torch.tensor([[[[0.0, 1.0]]]])
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(Lp("linf", 0.1).apply(x, point).sum(), point)
    assert gradient.flatten().tolist() == [1.0, 1.0]
    assert not Lp("linf", 0.1).project(point, x).requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linff", 0.1), "did you mean 'linf'"),
        (("linf", -0.1), r"eps must be >= 0 and finite, got -0.1"),
        (("linf", float("nan")), "finite"),
        (("linf", 8), "pixel units"),
        (("l2", "eight"), "8/255"),
        (("linf", 0.1, (1.0, 0.0)), "low < high"),
        (("l2", torch.tensor([0.1, -1.0])), "eps must be >= 0"),
        (("l2", torch.zeros(2, 1)), "shape"),
        (("l2", 0.5, (0.0, 1.0), "coordinate"), "for l0 'coordinate'"),
        (("linf", 0.1, 1.0), "low < high"),
        (("linf", [0.1]), "expected a number"),
        ((2, 0.1), "unknown norm '2'"),
    ],
)
def test_bad_threats_say_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        Lp(*arguments)


def test_fractions_of_255_are_understood():
    assert Lp("linf", "8/255").eps == 8 / 255


def test_l0_has_no_dual_norm():
    with pytest.raises(ValueError, match="l0 has no dual norm"):
        _ = Lp("l0", 3).dual_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linf_membership_of_a_mixed_batch_is_that_of_each_point_in_float64(dtype):
    """Far inside, at the edge, beyond it, out of bounds and NaN, in one batch and one by one."""
    x = torch.full((7, 1, 2, 3), 0.5, dtype=dtype)
    point = x.clone()
    point[:, 0, 0, 0] += torch.tensor([0.1, 0.2, 0.2 + 5e-7, 0.2 + 3e-6, 0.3, 0.6, torch.nan], dtype=torch.float64).to(
        dtype
    )
    threat = Lp("linf", 0.2)
    together = threat.contains(point, x)
    moved = (point.double() - x.double()).abs().flatten(1).amax(dim=1)
    assert together.tolist() == (moved <= 0.2 + 1e-6).tolist() == [True, True, True, False, False, False, False]
    for count in range(1, 8):
        assert torch.equal(threat.contains(point[:count], x[:count]), together[:count])
        assert torch.equal(threat.contains(point[count - 1 : count], x[:1]), together[count - 1 : count])
