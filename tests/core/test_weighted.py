"""Weighted balls: weights by hand, projections against scipy, steepest directions against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp
from robustbench_lite.core.weighted import WeightedLp, local_deviation
from robustbench_lite.evaluation.specs import build, spec, title

NORMS = ["linf", "l2", "l1"]
EPS = {"linf": 0.4, "l2": 1.5, "l1": 6.0}


def uniform(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def measured(norm, d):
    flat = d.flatten(1)
    return {"linf": flat.abs().amax(1), "l2": flat.norm(dim=1), "l1": flat.abs().sum(1)}[norm]


def test_the_deviation_is_that_of_each_window():
    x = uniform(2, 3, 4, 5)
    found = local_deviation(x)
    for b, c, i, j in np.ndindex(*x.shape):
        window = x[b, c, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2].numpy()
        assert found[b, c, i, j].item() == pytest.approx(window.std(), abs=1e-12)


def test_flat_regions_count_for_the_floor():
    flat = torch.full((1, 1, 3, 3), 0.7)
    assert torch.allclose(WeightedLp("l2", 1).weights(flat), torch.full((1, 1, 3, 3), 255.0, dtype=torch.float64))
    assert WeightedLp("l2", 1, floor="1/10").weights(flat).unique().item() == pytest.approx(10)


@pytest.mark.parametrize("norm", NORMS)
def test_distance_and_membership(norm):
    x, point = uniform(4, 1, 3, 3), uniform(4, 1, 3, 3, seed=1)
    threat = WeightedLp(norm, EPS[norm])
    expected = measured(norm, (point - x) / local_deviation(x).clamp_min(1 / 255))
    assert torch.allclose(threat.distance(point, x), expected)
    assert torch.equal(threat.contains(point, x), expected <= EPS[norm])
    assert not threat.contains(point + 2, x).any()
    assert WeightedLp(norm, None).contains(point, x).all()
    assert not WeightedLp(norm, None).contains(point * torch.nan, x).any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", range(4))
def test_projection_is_the_nearest_point_that_scipy_finds(norm, seed):
    x = uniform(1, 1, 2, 3, seed=seed)
    point = x + 3 * (uniform(1, 1, 2, 3, seed=seed + 50) - 0.5)
    threat = WeightedLp(norm, EPS[norm] / 4)
    clean, goal = x.flatten().numpy(), point.flatten().numpy()
    weights = threat.weights(x).flatten().numpy()
    # As a smooth problem: d = p - q with p, q >= 0, so that |d| is at most p + q.
    n = len(clean)

    def change(z):
        return z[:n] - z[n:]

    def room(z):
        size = weights * (z[:n] + z[n:])
        return {
            "linf": threat.eps - size,
            "l2": np.atleast_1d(threat.eps**2 - (size**2).sum()),
            "l1": np.atleast_1d(threat.eps - size.sum()),
        }[norm]

    box = [(0, high) for high in 1 - clean] + [(0, low) for low in clean]
    solved = minimize(
        lambda z: ((clean + change(z) - goal) ** 2).sum(),
        np.zeros(2 * n),
        bounds=box,
        constraints={"type": "ineq", "fun": room},
        method="SLSQP",
        options={"maxiter": 2000, "ftol": 1e-14},
    )
    found = threat.project(point, x)
    assert threat.contains(found, x).all()
    assert (found - point).norm().item() ** 2 <= solved.fun + 1e-6
    assert np.abs(found.flatten().numpy() - clean - change(solved.x)).max() < 1e-3


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 2.0)])
def test_points_are_strictly_inside(norm, dtype, bounds):
    low, high = bounds
    x = low + (high - low) * uniform(20, 3, 6, 5, dtype=dtype)
    x[:5] = x[:5].round()  # flat regions, and entries at a bound
    threat = WeightedLp(norm, 2 * EPS[norm], bounds)
    far = x + 4 * uniform(*x.shape, seed=2, dtype=dtype) - 2
    streams = Streams.from_generator(None, torch.arange(20))
    for points in (threat.project(far, x), threat.random_point(x, streams), threat.project(x, x)):
        assert points.dtype == dtype
        assert (threat.distance(points, x) <= threat.eps).all()
        assert ((points >= low) & (points <= high)).all()
    assert torch.equal(threat.project(x, x), x)
    assert torch.equal(WeightedLp(norm, 0, bounds).project(far, x), x)
    once = threat.project(far, x)
    assert torch.allclose(threat.project(once, x), once, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_is_the_maximiser_over_the_unit_ball(norm):
    x, gradient = uniform(5, 1, 3, 3), uniform(5, 1, 3, 3, seed=3) - 0.5
    threat = WeightedLp(norm, 1).around(x)
    best = threat.steepest(gradient)
    assert torch.allclose(measured(norm, threat.weights(x) * best), torch.ones(5, dtype=torch.float64))
    gain = (best * gradient).sum(dim=(1, 2, 3))
    dual = {"linf": "l1", "l2": "l2", "l1": "linf"}[norm]
    assert torch.allclose(gain, measured(dual, gradient / threat.weights(x)))
    for seed in range(50):
        other = (uniform(5, 1, 3, 3, seed=seed) - 0.5) / threat.weights(x)
        other = other / measured(norm, threat.weights(x) * other).reshape(-1, 1, 1, 1)
        assert ((other * gradient).sum(dim=(1, 2, 3)) <= gain + 1e-12).all()
    assert torch.equal(threat.steepest(torch.zeros_like(gradient)), torch.zeros_like(gradient))
    with pytest.raises(ValueError, match=r"around\(x\)"):
        WeightedLp(norm, 1).steepest(gradient)


def test_constant_weights_make_it_a_plain_ball():
    x, far = torch.full((6, 1, 4, 4), 0.5, dtype=torch.float64), uniform(6, 1, 4, 4, seed=5) * 3 - 1
    for norm in NORMS:
        plain, weighted = Lp(norm, EPS[norm] / 4), WeightedLp(norm, EPS[norm] * 255 / 4)
        assert torch.allclose(weighted.project(far, x), plain.project(far, x), atol=1e-9)
        assert torch.allclose(weighted.distance(far, x) / 255, plain.distance(far, x))


def test_weights_are_those_of_the_clean_images_of_the_rows():
    x, keep = uniform(6, 1, 4, 4), torch.tensor([4, 1])
    threat = WeightedLp("l1", 2.0)
    bound = threat.around(x)
    far = uniform(6, 1, 4, 4, seed=7)
    assert torch.equal(bound.take(keep).project(far[keep], x[keep]), threat.project(far, x)[keep])
    assert bound.around(far) is bound
    assert bound == threat


def test_it_is_named_and_rebuilt_by_its_fields():
    threat = WeightedLp("l2", "1/2", floor="2/255")
    assert build(spec(threat)) == threat == build(spec(threat.around(uniform(2, 1, 3, 3))))
    assert title(threat).startswith("WeightedLp(")
    assert threat.size == 0.5
    assert WeightedLp("l1", None).size is None
    assert threat.name != WeightedLp("l2", 0.5).name
    assert WeightedLp("l2", 0.5, (0, 2)).name == "weighted_l2[0,2]"


def test_bad_settings_say_what_is_wrong():
    for build_it, message in [
        (lambda: WeightedLp("l0", 1), "weighted norm"),
        (lambda: WeightedLp("l2", -1), "eps must be >= 0"),
        (lambda: WeightedLp("l2", 1, floor=0), "floor must be > 0"),
        (lambda: WeightedLp("l2", 1, bounds=(1, 0)), "bounds"),
        (lambda: WeightedLp("l2", None).radius(uniform(1, 1, 2, 2)), "needs a budget"),
        (lambda: WeightedLp("l1", 1e9).check_fits(uniform(1, 1, 2, 2)), "wider than the whole"),
    ]:
        with pytest.raises(ValueError, match=message):
            build_it()
