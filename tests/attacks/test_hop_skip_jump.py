"""HopSkipJump: exact distances of linear models, its estimate of the normal, its purse, and foolbox as a yardstick."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustbench_lite.attacks import HopSkipJump
from robustbench_lite.attacks._decision import bisect, random_start
from robustbench_lite.attacks._purse import Purse
from robustbench_lite.core.goals import Targeted, Untargeted
from robustbench_lite.core.models import ABSTAIN, predict
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def linear():
    """Two classes; the boundary <w, x> = <w, 0.5> runs through the middle of the cube."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).double()
    weight = torch.randn(36, dtype=torch.float64, generator=generator(4))
    with torch.no_grad():
        net[1].weight.copy_(torch.stack([torch.zeros_like(weight), weight]))
        net[1].bias.copy_(torch.stack([torch.zeros(()), -weight.sum() / 2]))
    return net, weight


@pytest.mark.parametrize(("norm", "dual"), [("l2", 2), ("linf", 1)])
@pytest.mark.parametrize("targeted", [False, True])
def test_it_comes_near_the_exact_distance_of_a_linear_model(norm, dual, targeted, linear, images):
    net, weight = linear
    x = images * 0.2 + 0.4  # far from the image bounds
    y = predict(net, x)
    exact = ((x - 0.5).flatten(1) @ weight).abs() / torch.linalg.vector_norm(weight, dual)
    goal = Targeted(1 - y) if targeted else y
    result = HopSkipJump()(net, x, goal, Lp(norm, None), max_queries=4000, generator=generator())
    assert result.success.all()
    assert (result.distance >= exact * (1 - 1e-9)).all()
    assert (result.distance <= exact * {"l2": 1.05, "linf": 1.2}[norm]).all()


def test_a_budget_ends_the_search_within_it(linear, images):
    net, weight = linear
    x = images * 0.2 + 0.4
    y = predict(net, x)
    exact = ((x - 0.5).flatten(1) @ weight).abs() / weight.norm()
    eps = exact.median().item() * 1.2
    result = HopSkipJump()(net, x, y, Lp("l2", eps), max_queries=3000, generator=generator())
    assert torch.equal(result.success, exact < eps)
    assert (result.distance[result.success] <= eps).all()
    assert (result.forwards[result.success] < 3000).all()
    assert torch.equal(result.forwards[result.success], result.first_success[result.success])


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_memory_changes_no_answer(norm, monkeypatch, net, images):
    y = predict(net, images)
    plenty = HopSkipJump()(net, images, y, Lp(norm, None), max_queries=400, generator=generator())
    for capacity in (1, 20):
        monkeypatch.setattr(Oracle, "capacity", property(lambda self, capacity=capacity: capacity))
        asked = []
        hook = net.register_forward_hook(lambda _, args, logits, asked=asked: asked.append(len(logits)))
        little = HopSkipJump()(net, images, y, Lp(norm, None), max_queries=400, generator=generator())
        hook.remove()
        assert torch.allclose(little.distance, plenty.distance, atol=1e-9)
        assert torch.equal(little.forwards, plenty.forwards)
        assert max(asked) <= max(12, capacity)  # 12 samples ask one question each, or a block of 8 probes


def test_iterations_end_it(net, images):
    y = predict(net, images)
    short, long = (HopSkipJump(iterations=n)(net, images, y, Lp("l2", None), generator=generator()) for n in (1, 4))
    assert (short.forwards < long.forwards).all()
    assert (short.forwards - short.first_success).max() <= 8 + 100 + 8 + 8  # back, estimate, jump, and back
    assert (long.distance <= short.distance).all()


class Halves(nn.Module):
    """Answers 1 where the upper half of an image is brighter than the lower by 0.3, else 0."""

    def forward(self, x):
        gap = x[:, :, :8].mean((1, 2, 3)) - x[:, :, 8:].mean((1, 2, 3))
        return torch.stack([torch.zeros_like(gap), gap - 0.3], dim=1)


def test_starts_are_sought_among_coarse_noise_too():
    """Fine noise never has such halves: its means differ by 0.04."""
    x = torch.full((5, 1, 16, 16), 0.5, dtype=torch.float64)
    result = HopSkipJump(draws=300, iterations=3)(Halves(), x, torch.zeros(5, dtype=torch.int64), Lp("l2", None))
    assert result.success.all()


class Detector(nn.Module):
    """Answers by the first pixel: 0 below 0.4, a refusal up to 0.7, 1 above."""

    rejects = True

    def forward(self, x):
        return torch.stack([0.7 - x[:, 0, 0, 0], x[:, 0, 0, 0] - 0.7], dim=1)

    def predict(self, x):
        first = x[:, 0, 0, 0]
        return torch.where(first < 0.4, 0, torch.where(first <= 0.7, ABSTAIN, 1))


def test_a_refusal_is_no_success_on_either_side_of_the_walk():
    x = torch.full((4, 1, 2, 2), 0.2, dtype=torch.float64)
    result = HopSkipJump()(Detector(), x, torch.zeros(4, dtype=torch.int64), Lp("l2", None), max_queries=3000)
    assert torch.allclose(result.distance, torch.full((4,), 0.5, dtype=torch.float64), rtol=0.1)


def test_bisection_ends_beside_the_boundary_on_its_far_side(linear, images):
    net, _ = linear
    goal = Untargeted(predict(net, images))
    streams = Streams.from_generator(None, torch.arange(12))
    with Oracle(net, images, goal, Lp("l2", None), access=Access.LABEL) as oracle:
        purse = Purse(oracle, None)
        rows, far = random_start(oracle, purse, oracle.standing(), streams, 100)
        near = bisect(oracle, purse, rows, far, 20)
    assert len(rows) == 12
    assert (predict(net, near) != goal.labels).all()
    beyond = torch.lerp(images, near, 1 - 1e-3)
    assert (predict(net, beyond) == goal.labels).all()


def test_bad_settings_say_what_is_wrong(net, images):
    for build, message in [
        (lambda: HopSkipJump(iterations=0), "iterations must be a whole number"),
        (lambda: HopSkipJump(probes=0.5), "probes must be a whole number"),
        (lambda: HopSkipJump(queries=0), "queries must be a whole number"),
        (lambda: HopSkipJump(gamma=0), "gamma must be > 0"),
        (lambda: HopSkipJump()(net, images, predict(net, images), Lp("l1", 1)), "does not support"),
    ]:
        with pytest.raises(ValueError, match=message):
            build()
