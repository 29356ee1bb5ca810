"""BPDA and EOT: what they compute, and planted masks that fall to them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustbench_lite.attacks import BPDA, EOT, PGD, ExpectedGradient
from robustbench_lite.core.goals import Untargeted
from robustbench_lite.core.losses import cross_entropy, margin
from robustbench_lite.core.models import predict
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.threats import Lp


def quantise(x):
    return (x * 7).round() / 7


def test_bpda_computes_the_one_and_differentiates_the_other():
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    straight = BPDA(quantise)
    assert torch.equal(straight(x), quantise(x))
    weights = torch.randn_like(x)
    (slope,) = torch.autograd.grad((straight(x) * weights).sum(), x)
    assert torch.equal(slope, weights)
    (slope,) = torch.autograd.grad((BPDA(quantise, torch.sin)(x) * weights).sum(), x)
    assert torch.allclose(slope, weights * x.cos())


def test_bpda_says_when_the_two_do_not_fit():
    with pytest.raises(ValueError, match=r"forward gives shape \(2, 1, 4, 4\), backward \(2, 16\)"):
        BPDA(quantise, lambda x: x.flatten(1))(torch.rand(2, 1, 4, 4))
    with pytest.raises(TypeError, match="backward must be a function"):
        BPDA(quantise, "identity")


def test_quantisation_masks_gradients_and_bpda_unmasks_them(net, images):
    class Quantised(nn.Module):
        def forward(self, x):
            return net(quantise(x))

    defense, threat = Quantised(), Lp("linf", 0.3)
    y = predict(defense, images)
    naive = PGD(random_start=False)(defense, images, y, threat)
    adaptive = PGD(random_start=False)(defense, images, y, threat, view=nn.Sequential(BPDA(quantise), net))
    assert naive.success.sum() == 0
    assert adaptive.success.sum() >= 10
    assert torch.equal(predict(defense, adaptive.x_adv) != y, adaptive.success)


class Noisy(nn.Module):
    """A linear model whose weights are drawn afresh at each call."""

    stochastic = True

    def __init__(self, spread=1.0):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(3, 36, dtype=torch.float64, generator=self.generator)
        self.spread = spread

    def forward(self, x):
        noise = torch.randn(3, 36, dtype=torch.float64, generator=self.generator)
        return x.flatten(1) @ (self.weight + self.spread * noise).T


def test_eot_averages_what_its_name_says(images):
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits, self.calls = torch.randn(2, 12, 3, dtype=torch.float64), 0

        def forward(self, x):
            self.calls += 1
            return self.logits[(self.calls - 1) % 2]

    draws = Draws()
    assert torch.allclose(EOT(draws, 2, "logits")(images), draws.logits.mean(dim=0))
    mean = draws.logits.softmax(dim=-1).mean(dim=0)
    assert torch.allclose(EOT(draws, 2)(images), mean.log())
    with pytest.raises(ValueError, match="unknown average"):
        EOT(draws, 2, "median")
    with pytest.raises(ValueError, match="samples must be a whole number"):
        EOT(draws, 0)


def test_an_average_of_averages_pays_for_every_draw(images):
    class Counted(Noisy):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = Counted()
    view = nn.Sequential(EOT(EOT(model, 5), 4))
    with Oracle(model, images, Untargeted(torch.zeros(12, dtype=torch.int64)), Lp("linf", 0.3), view=view) as oracle:
        oracle.gradient(images, torch.arange(12), margin, candidate=False)
    assert model.calls == 20
    assert (oracle.forwards == 20).all()


@pytest.mark.parametrize("use", ["view", "estimator"])
def test_averaged_gradients_come_nearer_to_the_true_one_and_all_draws_are_counted(use, images):
    from robustbench_lite.core.rng import Streams

    model, goal = Noisy(), Untargeted(torch.zeros(12, dtype=torch.int64))
    quiet = Noisy(spread=0.0)
    rows, threat = torch.arange(12), Lp("linf", 0.3)

    def loss(logits, goal):
        return logits[:, 1] - logits[:, 0]

    truth = quiet.weight[1] - quiet.weight[0]

    def cosine(samples):
        view = EOT(model, samples, "logits") if use == "view" else None
        with Oracle(model, images, goal, threat, view=view, stop="never") as oracle:
            if use == "view":
                slope = oracle.gradient(images, rows, loss, candidate=False)[1]
                assert (oracle.forwards == samples).all()
            else:
                slope = ExpectedGradient(samples)(oracle, images, rows, loss, Streams.from_generator(None, rows))
                assert (oracle.backwards == samples).all()
                assert (oracle.forwards >= samples).all()  # and the votes on lucky draws
        return torch.cosine_similarity(slope.flatten(1), truth.expand(len(slope), -1)).mean()

    assert cosine(200) > 0.98 > cosine(1)


def test_what_falls_is_wrong_in_most_draws_and_expected_gradients_climb(images):
    model, quiet = Noisy(spread=0.3), Noisy(spread=0.0)
    y, threat = predict(quiet, images), Lp("linf", 0.1)
    found = PGD(steps=10, random_start=False, estimator=ExpectedGradient(20))(model, images, y, threat)
    wrong = torch.stack([predict(model, found.x_adv) != y for _ in range(500)]).double().mean(dim=0)
    assert found.success.sum() >= 3
    assert (wrong[found.success] > 0.45).all()
    gain = cross_entropy(quiet(found.x_adv), Untargeted(y)) - cross_entropy(quiet(images), Untargeted(y))
    assert (gain > 0)[found.distance != 0].all()


@pytest.mark.parametrize("chance", [0.2, 0.35, 0.4])
def test_a_search_does_not_fell_a_model_by_trying_often(chance):
    """A coin that is wrong with a chance below one half, at any input, never loses a fair vote."""

    class Coin(nn.Module):
        stochastic = True

        def forward(self, x):
            tails = torch.rand(len(x), generator=generator) < chance
            return torch.stack([~tails, tails], dim=1).to(x) + 0 * x.flatten(1).sum(dim=1, keepdim=True)

    generator = torch.Generator().manual_seed(0)
    x = torch.rand(100, 1, 2, 2, generator=generator)
    result = PGD(steps=40)(Coin(), x, torch.zeros(100, dtype=torch.int64), Lp("linf", 0.1))
    assert result.success.double().mean() <= (0.25 if chance == 0.4 else 0.02)


def test_draws_of_auto_pgd_stop_where_a_sample_falls_or_cannot_pay(images):
    from robustbench_lite.attacks import APGD

    model = Noisy(spread=1.0)
    y = predict(Noisy(spread=0.0), images)
    for budget in (22, 60, 150, 500):
        result = APGD(steps=5, eot=3)(model, images, y, Lp("linf", 0.1), max_queries=budget)
        assert result.forwards.max() <= budget
    fallen = APGD(steps=5, eot=20)(model, images, y, Lp("linf", 0.5))
    assert fallen.success.any()
    assert (fallen.forwards == fallen.first_success)[fallen.success].all()
