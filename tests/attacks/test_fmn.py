"""FMN: nearest points of linear models in closed form, and what its radius may do."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from robustbench_lite.attacks import FMN
from robustbench_lite.attacks._closing_in import soft_margin
from robustbench_lite.core.goals import Targeted, Untargeted
from robustbench_lite.core.losses import cross_entropy, margin
from robustbench_lite.core.models import predict
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp

WIDE = (-50.0, 50.0)  # bounds that no search meets
DUAL = {"linf": 1, "l2": 2, "l1": math.inf}


def linear(classes=2, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, classes)).double()
    with torch.no_grad():
        net[1].weight.copy_(scale * torch.randn(classes, 16, generator=generator))
        net[1].bias.copy_(torch.randn(classes, generator=generator))
    return net


def images(count=20):
    return torch.rand(count, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def boundary_distances(net, x, y, dual):
    """|z_y - z_j| / ||w_y - w_j||_dual for each j != y: (B, K - 1)."""
    logits, weight = net(x).detach(), net[1].weight.detach()
    gaps = logits.gather(1, y[:, None]) - logits
    slopes = torch.linalg.vector_norm(weight[y][:, None] - weight[None], ord=dual, dim=2)
    others = torch.ones_like(gaps, dtype=torch.bool).scatter(1, y[:, None], False)
    return (gaps / slopes)[others].reshape(len(x), -1)


@pytest.mark.parametrize(("norm", "allowed"), [("linf", 0.01), ("l2", 0.01), ("l1", 0.15)])
@pytest.mark.parametrize("classes", [2, 5])
def test_it_finds_the_nearest_point_of_a_linear_model(norm, allowed, classes):
    net, x = linear(classes), images()
    y = predict(net, x)
    result = FMN(steps=300)(net, x, y, Lp(norm, None, bounds=WIDE))
    best = boundary_distances(net, x, y, DUAL[norm]).amin(dim=1)
    assert result.success.all()
    assert (result.distance >= best * (1 - 1e-9)).all()
    assert ((result.distance / best).median() - 1) <= allowed


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_target_is_reached_at_its_own_distance(norm):
    net, x = linear(classes=3), images()
    y = predict(net, x)
    target = (y + 1) % 3
    result = FMN(steps=300)(net, x, Targeted(target), Lp(norm, None, bounds=WIDE))
    assert torch.equal(predict(net, result.x_adv), target)
    least = boundary_distances(net, x, y, DUAL[norm]).amin(dim=1)
    assert (result.distance >= least * (1 - 1e-9)).all()


@pytest.mark.parametrize("per", ["pixel", "coordinate"])
def test_l0_moves_no_more_pixels_than_a_greedy_solution(per):
    """A linear model falls when the gains of the best pixels, moved to their best bound, add up to the margin."""
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(20, 3, 4, 4, dtype=torch.float64, generator=generator)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).double()
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(2, 48, dtype=torch.float64, generator=generator))
    y = predict(net, x)
    logits, weight = net(x).detach(), net[1].weight.detach()
    slope = (weight[1 - y] - weight[y]).reshape(x.shape)
    gain = torch.maximum(slope * (1 - x), -slope * x)
    gain = gain.sum(dim=1) if per == "pixel" else gain
    gap = (logits.gather(1, y[:, None]) - logits.gather(1, 1 - y[:, None])).squeeze(1)
    needed = (gain.flatten(1).sort(dim=1, descending=True).values.cumsum(dim=1) <= gap[:, None]).sum(dim=1) + 1
    result = FMN(steps=300)(net, x, y, Lp("l0", None, per=per))
    fallible = needed <= gain[0].numel()
    assert torch.equal(result.success, fallible)
    assert (result.distance[fallible] >= needed[fallible]).all()
    assert (result.distance[fallible] - needed[fallible]).mean() <= 1


def test_more_steps_lead_nearer(net, images):
    y = predict(net, images)
    few, many = (FMN(steps=steps)(net, images, y, Lp("l2", None)).distance for steps in (20, 200))
    assert (many <= few * 1.01).all()
    assert many.mean() < few.mean()


def test_the_kept_point_is_the_nearest_adversarial_one_it_met(net, images):
    met = {"points": [], "rows": []}

    class Spy(Oracle):
        def gradient(self, points, rows, *args, **kwargs):
            met["points"].append(points.clone())
            met["rows"].append(rows)
            return super().gradient(points, rows, *args, **kwargs)

    threat, y = Lp("l2", None), predict(net, images)
    goal = Untargeted(y)
    with Spy(net, images, goal, threat) as oracle:
        oracle.judge_clean()
        FMN(steps=40).run(oracle, images, goal, threat, Streams.from_generator(None, torch.arange(12)))
    points, rows = torch.cat(met["points"]), torch.cat(met["rows"])
    with torch.no_grad():
        distance = torch.where(predict(net, points) != y[rows], threat.distance(points, images[rows]), torch.inf)
    best = torch.full((12,), torch.inf, dtype=torch.float64).scatter_reduce(0, rows, distance, "amin")
    kept = threat.distance(oracle.best, images)
    assert (kept <= best + 1e-12).all()  # the last point is judged besides
    assert torch.isfinite(best).all()


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.5), ("l1", 2.0), ("l0", 3)])
def test_with_a_budget_no_candidate_leaves_the_ball(norm, eps, net, images):
    threat, y = Lp(norm, eps), predict(net, images)

    class Spy(Oracle):
        def gradient(self, points, rows, *args, **kwargs):
            assert self.threat.contains(points, self.x[rows]).all()
            return super().gradient(points, rows, *args, **kwargs)

    with Spy(net, images, Untargeted(y), threat) as oracle:
        oracle.judge_clean()
        FMN(steps=30).run(oracle, images, oracle.goal, threat, Streams.from_generator(None, torch.arange(12)))


def test_a_budget_a_sample(net, images):
    y = predict(net, images)
    nearest = FMN(steps=200)(net, images, y, Lp("l2", None)).distance
    result = FMN(steps=200)(net, images, y, Lp("l2", (nearest * 1.05).clamp_max(6)))
    assert result.success.all()
    result = FMN(steps=200)(net, images, y, Lp("l2", nearest * 0.5))
    assert result.success.sum() <= 2  # the search is no proof, but half the way is hardly ever enough


@pytest.mark.parametrize("kind", [Untargeted, Targeted])
def test_the_soft_margin_goes_from_the_direction_of_the_cross_entropy_to_the_margin(kind, net, images):
    goal = kind(predict(net, images))
    slopes = []
    for loss in (partial(soft_margin, temperature=1.0), cross_entropy):
        leaf = images.clone().requires_grad_()
        slopes.append(torch.autograd.grad(loss(net(leaf), goal).sum(), leaf)[0].flatten(1))
    assert torch.allclose(torch.cosine_similarity(*slopes), torch.ones(12, dtype=torch.float64))
    logits = 10 * torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gaps = [
        (soft_margin(logits, goal, temperature) - margin(logits, goal)).abs().max() for temperature in (1.0, 0.1, 0.0)
    ]
    assert gaps[0] <= math.log(3)
    assert gaps[1] <= 0.1 * math.log(3)
    assert gaps[2] == 0


def test_black_and_white_images_do_not_swallow_steps():
    """All pixels at a bound, half of the gradient pointing out of it: the other half must do the work."""
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    weight = torch.ones(16, dtype=torch.float64)
    weight[:8] = -100.0  # down to black, where the image is already
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    with torch.no_grad():
        net[1].weight.copy_(torch.stack([torch.zeros_like(weight), weight]))
        net[1].bias.copy_(torch.tensor([2.0, 0.0]))
    result = FMN(steps=100)(net, x, torch.tensor([0]), Lp("l2", None))
    assert result.success.all()
    assert result.distance.item() == pytest.approx(2 / math.sqrt(8), rel=0.01)


def test_bad_hyper_parameters_say_what_is_wrong():
    for options, message in [
        ({"steps": 0}, "steps must be a whole number"),
        ({"alpha_init": 0}, "alpha_init must be > 0"),
        ({"alpha_final": -1.0}, "alpha_final must be > 0"),
        ({"gamma_init": 1.0}, "gamma_init must be between 0 and 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            FMN(**options)
