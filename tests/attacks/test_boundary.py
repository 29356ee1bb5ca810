"""The Boundary attack: geometry of its proposals, distances that only fall, and foolbox as a yardstick."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from robustbench_lite.attacks import DCT, Boundary, LowFrequencyBoundary, Pixels, Tiles
from robustbench_lite.attacks.boundary import _Walk
from robustbench_lite.core.models import predict
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp

BASES = [Pixels(), DCT(0.5), Tiles(2)]


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def walkers(x, points, attack):
    return _Walk.start(torch.arange(len(x)), points, attack.spherical_step, attack.source_step)


@pytest.mark.parametrize("basis", BASES, ids=lambda b: type(b).__name__)
@pytest.mark.parametrize("spherical", [0.01, 0.2])
def test_proposals_go_along_the_sphere_and_then_inwards(basis, spherical, images):
    x = images * 0.01 + 0.5
    points = x + 0.05 * torch.randn(images.shape, dtype=torch.float64, generator=generator())
    attack = Boundary(basis=basis, spherical_step=spherical, source_step=0.03)
    streams = Streams.from_generator(None, torch.arange(12))
    sideways, nearer = attack._propose(x, walkers(x, points, attack), streams, (0.0, 1.0))
    away, after, inside = ((p - x).flatten(1) for p in (points, sideways, nearer))
    distance = away.norm(dim=1)
    assert torch.allclose(after.norm(dim=1), distance)
    assert torch.allclose(inside.norm(dim=1), 0.97 * distance)
    assert torch.allclose(inside / 0.97, after)
    angle = torch.arccos((away * after).sum(dim=1) / distance.square())
    assert torch.allclose(angle, torch.arctan(torch.full((12,), spherical, dtype=torch.float64)))
    # What was added to the line to the clean image lies in the span of the basis and that line.
    added = after * (1 + spherical**2) ** 0.5 - away
    left = added - basis.project(added.reshape(x.shape)).flatten(1)
    line = away - basis.project(away.reshape(x.shape)).flatten(1)
    along = (left * line).sum(dim=1, keepdim=True) / line.square().sum(dim=1, keepdim=True).clamp_min(1e-30)
    assert torch.allclose(left, along * line, atol=1e-9)


@pytest.mark.parametrize("attack", [Boundary(), LowFrequencyBoundary(basis=DCT(0.5))], ids=["pixels", "dct"])
def test_more_queries_never_take_it_farther(attack, net, images):
    y = predict(net, images)
    runs = [
        attack(net, images, y, Lp("l2", None), max_queries=queries, generator=generator()).distance
        for queries in (20, 60, 150, 400)
    ]
    for early, late in pairwise(runs):
        assert (late <= early).all()
    assert runs[-1].median() < 0.7 * runs[1].median()


def test_it_comes_near_the_exact_distance_of_a_linear_model(images):
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).double()
    weight = torch.randn(36, dtype=torch.float64, generator=generator(4))
    with torch.no_grad():
        net[1].weight.copy_(torch.stack([torch.zeros_like(weight), weight]))
        net[1].bias.copy_(torch.stack([torch.zeros(()), -weight.sum() / 2]))
    x = images * 0.2 + 0.4
    exact = ((x - 0.5).flatten(1) @ weight).abs() / weight.norm()
    result = Boundary()(net, x, predict(net, x), Lp("l2", None), max_queries=2000, generator=generator())
    assert (result.distance >= exact * (1 - 1e-9)).all()
    assert (result.distance <= exact * 1.2).all()


def test_low_frequencies_are_found_faster_where_the_boundary_is_smooth():
    """The model looks at the mean brightness alone: one coefficient of the DCT."""
    x = torch.full((6, 1, 12, 12), 0.3, dtype=torch.float64)
    y = torch.zeros(6, dtype=torch.int64)

    def brightness(x):
        return torch.stack([torch.full((len(x),), 0.5).to(x), x.mean((1, 2, 3))], dim=1)

    low, pixels = (
        attack(brightness, x, y, Lp("l2", None), max_queries=250, generator=generator()).distance
        for attack in (LowFrequencyBoundary(), Boundary())
    )
    exact = 0.2 * 12
    assert (low < pixels).all()
    assert (low >= exact * (1 - 1e-9)).all()


def test_the_low_frequency_attack_is_the_same_attack_with_other_settings(net, images):
    y = predict(net, images)
    same = Boundary(spherical_step=0.2, spherical_rates=None, source_rates=(0.2, 0.6), window=50, basis=DCT(0.25))
    first, second = (
        attack(net, images, y, Lp("l2", None), max_queries=120, generator=generator())
        for attack in (LowFrequencyBoundary(), same)
    )
    assert torch.equal(first.x_adv, second.x_adv)
    assert torch.equal(first.forwards, second.forwards)


@pytest.mark.parametrize(("hit", "factor"), [(True, 2.0), (False, 0.5)])
def test_steps_adapt_to_each_samples_own_rate(hit, factor, images):
    attack = Boundary(window=4, factor=2.0)
    walk = walkers(images, images, attack)
    hits = torch.tensor([hit] * 6 + [not hit] * 6)
    scales = [attack._scale(walk.proposals, hits, (0.1, 0.25)) for _ in range(8)]
    for trial, scale in enumerate(scales, start=1):
        expected = torch.where(hits, 2.0, 0.5) if trial % 4 == 0 else torch.ones(12)
        assert torch.equal(scale.float(), expected)
    assert scales[3][0] == factor


def test_steps_and_convergence_end_it(net, images):
    y = predict(net, images)
    short = Boundary(steps=20)(net, images, y, Lp("l2", None), generator=generator())
    assert (short.forwards - short.first_success).max() <= 20 + 2 + 10  # steps, looks, and the way to the boundary
    lost = Boundary(converged=0.009, spherical_step=0.9)(net, images, y, Lp("l2", None), generator=generator())
    assert lost.forwards.max() < 5000


def test_bad_settings_say_what_is_wrong(net, images):
    for build, message in [
        (lambda: Boundary(steps=0), "steps must be a whole number"),
        (lambda: Boundary(queries=-1), "queries must be a whole number"),
        (lambda: Boundary(spherical_step=0), "spherical_step must be between 0 and 1"),
        (lambda: Boundary(factor=1), "factor must be > 1"),
        (lambda: Boundary(source_rates=(0.5, 0.2)), "source_rates must be"),
        (lambda: Boundary(source_rates=None), "source_rates must be"),
        (lambda: Boundary()(net, images, predict(net, images), Lp("linf", 0.1)), "does not support"),
    ]:
        with pytest.raises(ValueError, match=message):
            build()
