"""FAB-T: its projections against exact solvers, its distances against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, linprog

from robustbench_lite.attacks import FABT
from robustbench_lite.attacks._fab_projections import NEAREST
from robustbench_lite.core.goals import Targeted
from robustbench_lite.core.models import predict
from robustbench_lite.core.norms import NORMS
from robustbench_lite.core.threats import Lp

DUAL = {"linf": 1, "l2": 2, "l1": float("inf")}


def least_norm(norm, w, gain, low, high):
    """The least norm of a d in the box with <w, d> = gain, by linear programming or a root of the KKT multiplier."""
    size = len(w)
    if norm == "l2":

        def d(multiplier):
            return np.clip(multiplier * w, low, high)

        end = 1e6 if gain > 0 else -1e6
        return np.linalg.norm(d(brentq(lambda m: w @ d(m) - gain, 0, end, xtol=1e-14, rtol=1e-14)))
    if norm == "linf":  # variables (d, t): minimise t with |d_i| <= t
        cost = np.r_[np.zeros(size), 1]
        eye, one = np.eye(size), np.ones((size, 1))
        upper = np.block([[eye, -one], [-eye, -one]])
        answer = linprog(
            cost, upper, np.zeros(2 * size), np.r_[w, 0][None], [gain], [*zip(low, high, strict=True), (0, None)]
        )
    else:  # d = p - n, both >= 0: minimise their sum
        bounds = [(0, h) for h in high] + [(0, -b) for b in low]
        answer = linprog(np.ones(2 * size), A_eq=np.r_[w, -w][None], b_eq=[gain], bounds=bounds)
    assert answer.status == 0
    return answer.fun


@pytest.mark.parametrize("norm", list(NEAREST))
def test_projections_are_those_of_an_exact_solver(norm):
    g = torch.Generator().manual_seed(0)
    n, size = 30, 12
    w = torch.randn(n, size, dtype=torch.float64, generator=g)
    w[:, 3] = 0
    w[:5] *= 1e-9
    x = torch.rand(n, size, dtype=torch.float64, generator=g)
    x[:, :2] = torch.tensor([0.0, 1.0])
    low, high = -x, 1 - x
    reach = torch.where(w > 0, w * high, w * low).sum(dim=1), torch.where(w > 0, w * low, w * high).sum(dim=1)
    share = torch.rand(n, dtype=torch.float64, generator=g) ** 3
    gain = torch.where(torch.arange(n) % 2 == 0, *reach) * share
    d = NEAREST[norm](w, gain.unsqueeze(1), low, high)
    assert ((d >= low) & (d <= high)).all()
    assert torch.allclose((w * d).sum(dim=1) / w.abs().amax(dim=1), gain / w.abs().amax(dim=1), atol=1e-9)
    for i in range(n):
        scale = w[i].abs().max().item()
        expected = least_norm(norm, w[i].numpy() / scale, gain[i].item() / scale, low[i].numpy(), high[i].numpy())
        found = NORMS[norm].size(d[i].reshape(1, 1, 1, -1)).item()
        assert abs(found - expected) < 1e-7, i


@pytest.mark.parametrize("norm", list(NEAREST))
def test_out_of_reach_the_projection_goes_to_the_nearest_corner(norm):
    w = torch.tensor([[1.0, -2.0, 0.0, 3.0]], dtype=torch.float64)
    low, high = torch.full_like(w, -0.25), torch.full_like(w, 0.5)
    d = NEAREST[norm](w, torch.tensor([[100.0]], dtype=torch.float64), low, high)
    assert torch.allclose(d, torch.tensor([[0.5, -0.25, 0, 0.5]], dtype=torch.float64))
    d = NEAREST[norm](w, torch.tensor([[-100.0]], dtype=torch.float64), low, high)
    assert torch.allclose(d, torch.tensor([[-0.25, 0.5, 0, -0.25]], dtype=torch.float64))
    nothing = NEAREST[norm](0 * w, torch.tensor([[1.0]], dtype=torch.float64), low, high)
    assert torch.equal(nothing, 0 * w)


def linear(classes=4, size=16, seed=0):
    """A linear model of images (B, 1, 4, 4), with its weights (classes, 16)."""
    weights = torch.randn(classes, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (lambda x: (x.flatten(1) - 0.5) @ weights.T), weights


def grey(count=20):
    """Images far from the bounds."""
    noise = torch.randn(count, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return 0.5 + 0.02 * noise


@pytest.mark.parametrize("norm", list(NEAREST))
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_distances_on_a_linear_model_are_its_margins_over_the_dual_norm(norm, classes):
    model, weights = linear(classes)
    x = grey()
    y, logits = predict(model, x), model(x)
    lead = logits.gather(1, y.unsqueeze(1)) - logits
    slopes = torch.linalg.vector_norm(weights[y].unsqueeze(1) - weights, ord=DUAL[norm], dim=2)
    exact = torch.where(slopes > 0, lead / slopes, torch.inf).amin(dim=1)
    found = FABT(steps=20)(model, x, y, Lp(norm, None))
    assert found.success.all()
    assert (found.distance / exact).min() >= 1 - 1e-9
    assert (found.distance / exact).max() < 1.01
    # Towards one class only, by a targeted goal.
    goal = Targeted((y + 1) % classes)
    towards = FABT(steps=20)(model, x, goal, Lp(norm, None))
    assert torch.equal(predict(model, towards.x_adv) == goal.labels, towards.success)
    assert towards.success.sum() >= 18
    if classes == 2:
        assert (towards.distance / exact).max() < 1.01


@pytest.mark.parametrize("norm", list(NEAREST))
def test_with_a_budget_it_stops_at_the_first_success_inside(norm):
    model, _ = linear(3)
    x = grey()
    y = predict(model, x)
    nearest = FABT(steps=30)(model, x, y, Lp(norm, None)).distance
    wide, narrow = (FABT(steps=30)(model, x, y, Lp(norm, nearest * factor)) for factor in (1.1, 0.9))
    assert wide.success.all()
    assert torch.equal(wide.first_success, wide.forwards)
    assert not narrow.success.any()


def test_a_gradient_is_asked_for_where_a_step_starts_and_seldom_elsewhere(net, images):
    """A step costs one gradient; its end, where it succeeds and is taken back, a question without a gradient."""
    y = predict(net, images)
    result = FABT(steps=10, target_classes=2)(net, images, y, Lp("linf", None), stop="never")
    assert (result.backwards >= 2 * 11).all()
    assert (result.backwards <= 2 * 21).all()
    assert (result.forwards >= 2 + result.backwards).all()
    assert (result.forwards <= 2 + 3 * result.backwards / 2 + 2 * 10).all()
    assert (result.forwards > 2 + result.backwards).any()


def test_more_classes_and_restarts_never_hurt_and_a_batch_equals_its_samples(net, images):
    y = predict(net, images)
    for norm in NEAREST:
        threat = Lp(norm, None)
        few, all_, again = (
            FABT(steps=5, target_classes=classes, restarts=restarts)(net, images, y, threat)
            for classes, restarts in ((1, 1), (9, 1), (9, 3))
        )
        assert (all_.distance <= few.distance).all()
        assert again.distance.mean() <= all_.distance.mean() * 1.02
        alone = FABT(steps=5, restarts=3)(net, images[7:8], y[7:8], threat, indices=torch.tensor([7]))
        assert torch.allclose(alone.x_adv[0], again.x_adv[7], atol=1e-9)


def test_random_starts_lie_within_half_the_budget(net, images):
    from robustbench_lite.core.goals import Untargeted
    from robustbench_lite.core.oracle import Oracle
    from robustbench_lite.core.rng import Streams

    for norm, eps in (("linf", 0.2), ("l2", 0.6), ("l1", 2.0)):
        threat = Lp(norm, eps)
        with Oracle(net, images, Untargeted(predict(net, images)), threat) as oracle:
            start = FABT._start(oracle, threat, torch.arange(12), Streams.from_generator(None, torch.arange(12)))
        distance = threat.distance(start, images)
        assert (distance <= eps / 2 + 1e-9).all()
        assert distance.min() > eps / 6


def test_hyper_parameters_are_checked():
    for options, message in [
        ({"steps": 0}, "steps must be a whole number"),
        ({"restarts": 0}, "restarts must be a whole number"),
        ({"target_classes": 0}, "target_classes must be a whole number"),
        ({"alpha_max": 2}, "alpha_max must be in"),
        ({"eta": 0.9}, "eta must be at least 1"),
        ({"beta": 1}, "beta must be between"),
    ]:
        with pytest.raises(ValueError, match=message):
            FABT(**options)
    assert FABT().supports(Lp("l1", None)) and not FABT().supports(Lp("l0", 3))
