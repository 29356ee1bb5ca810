"""The grid against brute force, and worst-of-k's draws."""

from __future__ import annotations

import itertools

import pytest
import torch

from robustbench_lite.attacks import RotationTranslationGrid
from robustbench_lite.core.goals import Targeted, Untargeted
from robustbench_lite.core.losses import cross_entropy
from robustbench_lite.core.models import predict
from robustbench_lite.core.spatial import RotationTranslation

THREAT = RotationTranslation(20, 1)


def triples(threat, angles=31, shifts=5):
    spread = [threat.pixels * (2 * i / (shifts - 1) - 1) for i in range(shifts)]
    turns = [threat.degrees * (2 * i / (angles - 1) - 1) for i in range(angles)]
    return torch.tensor(list(itertools.product(turns, spread, spread)), dtype=torch.float64)


def brute_force(net, images, goal, threat):
    """Losses and successes at all grid points, each (775, B)."""
    losses, wins = [], []
    with torch.no_grad():
        for point in triples(threat):
            logits = net(threat.apply(images, point.expand(len(images), 3)))
            losses.append(cross_entropy(logits, goal))
            wins.append(goal.achieved(logits.argmax(dim=1)))
    return torch.stack(losses), torch.stack(wins)


def test_the_points_are_all_triples_the_outermost_first():
    points = RotationTranslationGrid().points(torch.zeros(1, 1, 6, 6, dtype=torch.float64), THREAT)
    assert len(points) == 775
    ours, expected = (sorted(map(tuple, p.mul(1e6).round().long().tolist())) for p in (points, triples(THREAT)))
    assert ours == expected
    shares = (points / torch.tensor([20.0, 1.0, 1.0])).norm(dim=1)
    assert (shares.diff() < 1e-3).all()
    assert shares[0] == pytest.approx(3**0.5)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_finds_what_brute_force_finds(targeted, scale, net, images):
    threat = RotationTranslation(20 * scale, scale)
    y = predict(net, images)
    goal = Targeted((y + 1) % 4) if targeted else Untargeted(y)
    losses, wins = brute_force(net, images, goal, threat)
    result = RotationTranslationGrid()(net, images, goal, threat)
    assert torch.equal(result.success, wins.any(dim=0))
    assert 0 < result.success.sum() < len(images)
    kept = cross_entropy(net(result.x_adv), goal).detach()
    stands = ~result.success
    assert torch.allclose(kept[stands], losses.amax(dim=0)[stands], atol=1e-9)
    assert (result.forwards[stands] > 775).all()
    assert (result.forwards[stands] < 775 * 1.05).all()


def test_without_a_stop_the_worst_success_is_kept(net, images):
    y = predict(net, images)
    losses, wins = brute_force(net, images, Untargeted(y), THREAT)
    worst = torch.where(wins.any(dim=0), losses.masked_fill(~wins, -torch.inf).amax(dim=0), losses.amax(dim=0))
    result = RotationTranslationGrid()(net, images, y, THREAT, stop="never")
    assert torch.allclose(cross_entropy(net(result.x_adv), Untargeted(y)).detach(), worst, atol=1e-9)


class Detector(torch.nn.Module):
    """Refuses what it is not sure of: its answer is not the largest logit, so points must be judged one by one."""

    rejects = True

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)

    def predict(self, x):
        logits = self.net(x)
        top = logits.topk(2, dim=1).values
        return torch.where(top[:, 0] - top[:, 1] < 0.05, -1, logits.argmax(dim=1))


def test_a_detector_falls_wherever_one_point_passes_it(net, images):
    detector = Detector(net)
    y = predict(net, images)
    with torch.no_grad():
        answers = torch.stack([detector.predict(THREAT.apply(images, p.expand(12, 3))) for p in triples(THREAT)])
        clean = detector.predict(images)
    passed = ((answers != y) & (answers >= 0)).any(dim=0) | ((clean != y) & (clean >= 0))
    assert torch.equal(RotationTranslationGrid()(detector, images, y, THREAT).success, passed)


def test_one_angle_or_one_shift_is_none(net, images):
    x = images[:1]
    turns = RotationTranslationGrid(angles=5, shifts=1).points(x, THREAT)
    assert sorted(turns[:, 0].tolist()) == [-20, -10, 0, 10, 20]
    assert (turns[:, 1:] == 0).all()
    shifts = RotationTranslationGrid(angles=1, shifts=3).points(x, THREAT)
    assert (shifts[:, 0] == 0).all()
    assert len(shifts) == 9


def test_each_sample_has_draws_of_its_own(net, images):
    y = predict(net, images)
    attack, threat = RotationTranslationGrid(worst_of=10), RotationTranslation(5, 0.3)
    whole = attack(net, images, y, threat, generator=torch.Generator().manual_seed(1))
    again = attack(net, images, y, threat, generator=torch.Generator().manual_seed(1))
    assert torch.equal(whole.parameters, again.parameters)
    moved = whole.parameters[whole.parameters.any(dim=1)]
    assert len(moved) > 8
    assert len(moved.unique(dim=0)) == len(moved)
    for i in (0, 7):
        rows = slice(i, i + 1)
        generator = torch.Generator().manual_seed(1)
        alone = attack(net, images[rows], y[rows], threat, indices=torch.tensor([i]), generator=generator)
        assert torch.equal(alone.parameters, whole.parameters[rows])
    assert (whole.forwards[~whole.success] == 11).all()


@pytest.mark.parametrize("option", ["angles", "shifts", "worst_of"])
def test_bad_numbers_are_named(option):
    for value in (0, 2.5):
        with pytest.raises(ValueError, match=f"{option} must be a whole number, at least 1, got {value}"):
            RotationTranslationGrid(**{option: value})


@pytest.mark.parametrize("budget", [10, 17, 40, 50, 51, 83])
def test_a_small_budget_is_spent_to_the_last_query(budget, images):
    """On a model that does not fall: the points are tried singly where a block of 32 is too dear."""

    def firm(x):
        return torch.tensor([1.0, 0.0]).to(x).repeat(len(x), 1) + 0 * x.sum(dim=(1, 2, 3)).unsqueeze(1)

    y = torch.zeros(len(images), dtype=torch.int64)
    result = RotationTranslationGrid()(firm, images, y, RotationTranslation(), max_queries=budget)
    assert (result.forwards == budget).all()


def test_draws_go_on_from_block_to_block():
    """Sixteen points one by one, then blocks: none of a sample's comes twice."""
    asked = []

    def safe(x):
        asked.append(x.clone())
        return torch.stack([x.flatten(1).sum(dim=1) + 100, torch.zeros(len(x), dtype=x.dtype)], dim=1)

    x = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    RotationTranslationGrid(worst_of=100)(safe, x, torch.tensor([0]), THREAT)
    points = torch.cat(asked).flatten(1).unique(dim=0)
    assert len(points) == 1 + 100  # the clean image, too; a block's worst is asked about twice
