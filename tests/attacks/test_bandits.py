"""Bandits: what the prior learns on linear models, its tiles, its queries."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from robustbench_lite.attacks import Bandits, RandomNoise
from robustbench_lite.attacks.bandits import _tiled_zeros, _untile
from robustbench_lite.core.goals import Targeted, Untargeted
from robustbench_lite.core.models import predict
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp


def linear(weights, bias=0.3):
    """Two classes, logits +-(w.(x - 1/2) + bias) / 2."""

    def model(x):
        score = ((x - 0.5) * weights).flatten(1).sum(dim=1) + bias
        return torch.stack([score / 2, -score / 2], dim=1)

    return model


def learn(attack, norm, weights, steps, shape=(1, 8, 8)):
    """The priors after `steps` corrections at one point, for four samples."""
    x = torch.full((4, *shape), 0.5, dtype=torch.float64)
    rows = torch.arange(4)
    streams = Streams.from_generator(None, rows)
    prior = _tiled_zeros(x, attack.tile)
    goal = Untargeted(torch.zeros(4, dtype=torch.int64))
    with Oracle(linear(weights), x, goal, Lp(norm, 0.3), access=Access.SCORES) as oracle:
        for _ in range(steps):
            noise = streams.normal(*prior.shape[1:], dtype=x.dtype) / prior[0].numel() ** 0.5
            prior = attack._correct(oracle, norm, x, rows, prior, noise)
        assert (oracle.forwards == 2 * steps).all()
    return _untile(prior, x, attack.tile)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_prior_converges_to_the_gradient_of_a_linear_model(norm):
    weights = torch.randn(1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    attack = Bandits(tile=1, **({"exploration": 0.1} if norm == "l2" else {"online_lr": 10}))
    early, late = (learn(attack, norm, weights, steps) for steps in (20, 1500))
    gradient = -weights.expand_as(late)  # the loss of class 0 rises against its score
    cosines = [torch.cosine_similarity(p.flatten(1), gradient.flatten(1), dim=1) for p in (early, late)]
    assert (cosines[1] > cosines[0]).all()
    assert (cosines[1] > 0.7).all()
    agree = (late.sign() == gradient.sign()) | (gradient.abs() < 0.3)
    assert agree.double().mean() > 0.9


def test_the_prior_of_linf_stays_within_one():
    weights = 50 * torch.randn(1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    prior = learn(Bandits(tile=2, online_lr=1e4), "linf", weights, 50)
    assert prior.abs().max() <= 1
    assert prior.isfinite().all()


def test_the_exponentiated_gradient_is_the_papers_update():
    """p -> (a - b) / (a + b), with a = (1 + p) exp(eta g) and b = (1 - p) exp(-eta g)."""
    weights = torch.randn(1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    x = torch.full((1, 1, 8, 8), 0.5, dtype=torch.float64)
    rows, y = torch.arange(1), torch.zeros(1, dtype=torch.int64)
    g = torch.Generator().manual_seed(5)
    prior, noise = (torch.rand(1, 1, 8, 8, dtype=torch.float64, generator=g) - 0.5 for _ in range(2))
    model = linear(weights)
    with Oracle(model, x, Untargeted(y), Lp("linf", 0.3), access=Access.SCORES) as oracle:
        found = Bandits(tile=1, fd_eta=0.2, exploration=0.7, online_lr=3)._correct(
            oracle, "linf", x, rows, prior, noise
        )
    losses = []
    for side in (1, -1):
        q = prior + side * 0.7 * noise
        logits = model(x + 0.2 * q / q.norm())
        losses.append(nn.functional.cross_entropy(logits, y).item())
    gradient = (losses[0] - losses[1]) / (0.2 * 0.7) * 0.7 * noise
    grown, shrunk = (1 + prior) * torch.exp(3 * gradient), (1 - prior) * torch.exp(-3 * gradient)
    assert torch.allclose(found, (grown - shrunk) / (grown + shrunk), atol=1e-9)


def test_tiles_cover_the_image_and_are_cut_at_its_edge():
    images = torch.zeros(2, 3, 5, 7)
    tiles = _tiled_zeros(images, 4)
    assert tiles.shape == (2, 3, 2, 2)
    tiles[:] = torch.arange(4.0).reshape(2, 2)
    expected = torch.zeros(5, 7)
    expected[:4, 4:], expected[4:, :4], expected[4:, 4:] = 1, 2, 3
    assert torch.equal(_untile(tiles, images, 4), expected.expand(2, 3, 5, 7))


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.12), ("l2", 0.6)])
def test_it_beats_random_noise_and_equals_its_samples_one_by_one(norm, eps, net, images):
    x = torch.cat([images, images.flip(3), images.flip(2)])
    y, threat = predict(net, x), Lp(norm, eps)
    attack = Bandits(tile=1, queries=300)
    found = attack(net, x, y, threat)
    noise = RandomNoise(draws=300)(net, x, y, threat)
    assert found.success.sum() > noise.success.sum() + 3
    assert threat.contains(found.x_adv, x).all()
    for i in range(0, 36, 9):
        alone = attack(net, x[i : i + 1], y[i : i + 1], threat, indices=torch.tensor([i]))
        assert torch.allclose(alone.x_adv[0], found.x_adv[i], atol=1e-9)
        assert alone.forwards[0] == found.forwards[i]


def test_the_data_prior_helps_where_gradients_are_smooth():
    """Weights constant on tiles: a prior of 4 numbers learns in the queries that one of 64 needs to begin."""
    coarse = torch.tensor([[1.0, -2.0], [-1.0, 2.0]], dtype=torch.float64)
    weights = coarse.repeat_interleave(4, 0).repeat_interleave(4, 1)[None]
    cosines = [
        torch.cosine_similarity(
            learn(Bandits(tile=tile), "linf", weights, 12).flatten(1), -weights.flatten().expand(4, 64), dim=1
        ).mean()
        for tile in (4, 1)
    ]
    assert cosines[0] > cosines[1] + 0.2


def test_a_step_costs_three_queries_and_success_ends_the_search(net, images):
    y = predict(net, images)
    result = Bandits(tile=1, queries=60)(net, images, y, Lp("linf", 0.1))
    assert set(result.forwards[~result.success].tolist()) <= {61}
    assert torch.equal(result.forwards[result.success], result.first_success[result.success])
    assert ((result.forwards - 1) % 3 == 0).all()


def test_targets(net, images):
    goal = Targeted((predict(net, images) + 1) % 4)
    result = Bandits(tile=1, queries=600)(net, images, goal, Lp("linf", 0.4))
    assert result.success.sum() >= 5
    assert torch.equal(predict(net, result.x_adv) == goal.labels, result.success)


def test_hyper_parameters_are_checked():
    for options, message in [
        ({"tile": 0}, "tile must be a whole number"),
        ({"fd_eta": 0}, "fd_eta must be > 0"),
        ({"exploration": -1}, "exploration must be > 0"),
        ({"online_lr": math.inf}, "finite"),
        ({"image_lr": 0}, "image_lr must be > 0"),
        ({"queries": 3}, "queries must be a whole number"),
    ]:
        with pytest.raises(ValueError, match=message):
            Bandits(**options)
    assert not Bandits().supports(Lp("l2", None)) and not Bandits().supports(Lp("l1", 1))
