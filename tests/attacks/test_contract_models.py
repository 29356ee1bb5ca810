"""The contract of every attack on models of other kinds: randomised, refusing, broken, constant, or costly to see."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from robustbench_lite.attacks import Attack, Square
from robustbench_lite.core.goals import Targeted
from robustbench_lite.core.models import ABSTAIN, predict
from robustbench_lite.core.oracle import Access
from tests.attacks.contract_cases import CASES, every_case, generator, points_of, true_labels

WHITE_BOX = [case for case in CASES if case.values[0].attack.access == Access.GRADIENT and not case.values[0].foolbox]


@pytest.fixture
def y():
    return true_labels()


class Counted(nn.Module):
    """A net that counts the images it is shown, and wants to see some: `view(0, -1)` is an error to torch."""

    def __init__(self, net):
        super().__init__()
        self.net, self.asked = net, 0

    def forward(self, x):
        self.asked += len(x)
        return self.net(x.view(x.size(0), -1).view(x.shape))


class Randomised(Counted):
    """The net with noise on its logits."""

    stochastic = True

    def __init__(self, net):
        super().__init__(net)
        self.noise = generator()

    def forward(self, x):
        logits = super().forward(x)
        return logits + 0.03 * torch.randn(logits.shape, dtype=logits.dtype, generator=self.noise)


def with_queries(attack: Attack, queries: int) -> Attack:
    """Return the attack with this limit of its own, where it has one on forward passes (Square's is on candidates)."""
    if not hasattr(attack, "queries") or isinstance(attack, Square):
        return attack
    return dataclasses.replace(attack, queries=queries)


@every_case
def test_a_randomised_model_is_broken_in_most_draws(case, net, images, y):
    """The votes that confirm a success are counted, and come out of the budget: the attack's own, too."""
    model, rows = Randomised(net), slice(0, 4)
    attack = with_queries(case.attack, 140)
    result = attack(model, images[rows], y[rows], case.threat, max_queries=260, generator=generator())
    assert result.forwards.sum() == model.asked
    assert result.forwards.max() <= 260
    if attack is not case.attack:
        assert result.forwards[1:].max() <= 141  # the clean check aside
    assert case.threat.contains(points_of(result), images[rows]).all()
    assert result.success[0]
    wrong = torch.stack([model(result.x_adv) for _ in range(100)]).argmax(dim=2) != y[rows]
    assert (wrong.sum(dim=0) > 40)[result.success].all()


class Refusing(Counted):
    """A detector: it refuses where the two largest logits are close, and counts the images that `predict` is shown."""

    rejects = True

    def predict(self, x):
        self.asked += len(x)
        top = self.net(x).topk(2, dim=1).values
        return torch.where(top[:, 0] - top[:, 1] < 0.05, ABSTAIN, predict(self.net, x))


@every_case
def test_a_model_with_its_own_predict_is_judged_by_it_and_a_refusal_is_no_success(case, net, images, y):
    model = Refusing(net)
    rows = slice(0, 2 if case.foolbox else 4)
    run = {"max_queries": 30, "generator": generator()}
    result = case.attack(model, images[rows], y[rows], case.threat, **run)
    assert result.forwards.sum() == model.asked
    assert result.forwards.max() <= 30
    answers = model.eval().predict(result.x_adv)
    assert torch.equal((answers != y[rows]) & (answers != ABSTAIN), result.success)
    only_clean = case.attack(model, images[rows], y[rows], case.threat, max_queries=1)
    assert torch.allclose(only_clean.x_adv, images[rows], atol=1e-12)
    assert (only_clean.forwards == 1).all()


@every_case
def test_a_refusal_everywhere_is_no_success_anywhere(case, net, images, y):
    model = Refusing(net)
    model.predict = lambda x: torch.full((len(x),), ABSTAIN)
    result = case.attack(model, images[:2], y[:2], case.threat, max_queries=20, generator=generator())
    assert not result.success.any()
    assert case.threat.contains(points_of(result), images[:2]).all()


class Fragile(Counted):
    """Gives NaN for any image but the clean ones."""

    def __init__(self, net, clean):
        super().__init__(net)
        self.clean = clean.flatten(1)

    def forward(self, x):
        away = torch.cdist(x.flatten(1).detach(), self.clean).amin(dim=1) > 1e-6
        return super().forward(x).masked_fill(away.unsqueeze(1), torch.nan)


@every_case
def test_a_model_that_breaks_away_from_the_clean_image_reaches_no_target(case, net, images, y):
    model, rows = Fragile(net, images), slice(1, 3)
    run = {"max_queries": 40, "generator": generator()}
    try:
        result = case.attack(model, images[rows], Targeted((y[rows] + 1) % 4), case.threat, **run)
    except ValueError as error:
        assert "target" in str(error).lower()  # noqa: PT017
        return
    assert result.forwards.sum() == model.asked
    assert not result.success.any()
    assert case.threat.contains(points_of(result), images[rows]).all()


@every_case
def test_non_finite_logits_are_the_models_error(case, images):
    def broken(x):
        return torch.full((len(x), 3), float("nan")).to(x) + x.flatten(1).sum(dim=1, keepdim=True) * 0

    result = case.attack(broken, images, torch.zeros(len(images), dtype=torch.int64), case.threat)
    assert result.success.all()
    assert (result.distance == 0).all()
    assert (result.forwards == 1).all()


@every_case
def test_a_constant_model_does_not_fall(case, images):
    def constant(x):
        return torch.zeros(len(x), 3).to(x) + x.flatten(1).sum(dim=1, keepdim=True) * 0

    images = images[:3]
    result = case.attack(constant, images, torch.zeros(3, dtype=torch.int64), case.threat, max_queries=20)
    assert not result.success.any()
    assert case.threat.contains(points_of(result), images).all()


class Thrice(nn.Module):
    """A view that asks the net three times."""

    cost = 3

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return (self.net(x) + self.net(x) + self.net(x)) / 3


@pytest.mark.parametrize("case", WHITE_BOX)
@pytest.mark.parametrize("budget", [3, 150])
def test_a_view_of_several_passes_is_paid_for(case, budget, net, images, y):
    model = Counted(net)
    run = {"view": Thrice(model), "max_queries": budget, "generator": generator()}
    result = case.attack(model, images[:3], y[:3], case.threat, **run)
    assert result.forwards.sum() == model.asked
    assert result.forwards.max() <= budget
    assert budget == 3 or result.backwards.sum() > 0
