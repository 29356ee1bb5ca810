from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from scipy.stats import binomtest, chisquare, norm
from torch import Tensor, nn

from robustbench_lite.attacks import PGD, SmoothAdv
from robustbench_lite.certify.noise import GaussianNoise
from robustbench_lite.certify.randomized_smoothing import RandomizedSmoothing
from robustbench_lite.core.insides import Smoothed
from robustbench_lite.core.models import ABSTAIN, INVALID, predict, rejects
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.defenses import Deploy, GaussianAugmentation, SmoothedClassifier
from robustbench_lite.evaluation import evaluate
from robustbench_lite.training import train

SIGMA = 0.5


class HalfSpace(nn.Module):
    """Class 1 where w x > b; |w| = 2 in four values, and the margin is w x - b."""

    def forward(self, x: Tensor) -> Tensor:
        lead = x.flatten(1).sum(dim=1) - 2
        return torch.stack([-lead, lead], dim=1)


def smoothed(**other: Any) -> SmoothedClassifier:
    settings: dict[str, Any] = {"sigma": SIGMA, "n0": 20, "n": 2000, "draws": 200}
    return SmoothedClassifier(HalfSpace(), **(settings | other)).eval()


def at_distance(distance: list[float]) -> Tensor:
    """Images (B, 1, 2, 2) at these signed l2 distances from the boundary, class 1 where positive."""
    return torch.tensor([0.5 + d / 2 for d in distance]).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()


def probability(distance: float) -> float:
    """The share of class 1 under the noise: Phi(margin / (sigma |w|))."""
    return float(norm.cdf(distance / SIGMA))


@pytest.mark.parametrize("distance", [-0.4, 0.0, 0.1, 0.5])
def test_votes_follow_the_closed_form(distance: float) -> None:
    torch.manual_seed(0)
    draws = 4000
    votes = smoothed().votes(at_distance([distance, distance]), draws)
    assert votes.shape == (2, 3)
    assert votes[:, 2].tolist() == [0, 0]
    p = probability(distance)
    assert chisquare(votes[:, :2].flatten(), [draws * (1 - p), draws * p] * 2).pvalue > 1e-4


def test_each_image_and_each_draw_has_noise_of_its_own() -> None:
    torch.manual_seed(0)
    logits = torch.cat(list(smoothed().answers(at_distance([0.2] * 5), 30)))
    assert logits.shape == (30, 5, 2)
    assert logits[..., 1].unique().numel() == 150


def test_forward_is_the_log_of_the_mean_softmax() -> None:
    defense, x = smoothed(), at_distance([0.3, -0.1])
    torch.manual_seed(5)
    found = defense(x)
    torch.manual_seed(5)
    noise = SIGMA * torch.randn(50 * 2, 1, 2, 2).view(50, 2, 1, 2, 2)
    each = torch.stack([HalfSpace()(x + e).softmax(dim=1) for e in noise])
    assert torch.allclose(found, each.mean(dim=0).log(), atol=1e-5)
    assert torch.allclose(found.exp().sum(dim=1), torch.ones(2))


def test_under_the_null_it_abstains_but_for_alpha() -> None:
    torch.manual_seed(0)
    answers = predict(smoothed(alpha=0.2), at_distance([0.0] * 3000))
    answered = int((answers != ABSTAIN).sum())
    assert binomtest(answered, 3000, 0.2, alternative="greater").pvalue > 1e-4
    assert answered > 0.02 * 3000


def test_the_further_from_the_boundary_the_rarer_it_abstains_and_a_wrong_class_is_rare() -> None:
    torch.manual_seed(0)
    share = []
    for distance in (0.02, 0.1, 0.3):
        answers = predict(smoothed(), at_distance([distance] * 1000))
        assert (answers == 0).double().mean() < 0.005
        share.append(float((answers == 1).double().mean()))
    assert share == sorted(share)
    assert share[0] < 0.1
    assert share[-1] > 0.99
    assert not rejects(smoothed())


def test_a_second_look_helps_what_the_first_left_open() -> None:
    torch.manual_seed(0)
    x = at_distance([0.15] * 500)
    one, two = ((predict(smoothed(draws=d), x) == 1).double().mean() for d in (40, 400))
    assert one < 0.3
    assert two > 0.7


@pytest.mark.parametrize(("later", "answer"), [(109, ABSTAIN), (110, 1)])
def test_the_last_look_counts_the_votes_of_both(later: int, answer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """125 of 200 are clear at alpha / 2 = 0.0005 and 124 are not; neither are 15 of 20, nor 110 of 180 alone."""
    assert [binomtest(k, n, 0.5).pvalue <= 0.0005 for k, n in ((125, 200), (124, 200), (15, 20), (110, 180))] == [
        True, False, False, False
    ]  # fmt: skip
    script = {20: torch.tensor([[5, 15, 0]]), 180: torch.tensor([[180 - later, later, 0]])}
    defense = smoothed(draws=200)
    monkeypatch.setattr(defense, "votes", lambda x, draws: script[draws])
    assert predict(defense, at_distance([0.0])).tolist() == [answer]


class Broken(nn.Module):
    """No answer for bright images, half an answer for those between."""

    def forward(self, x: Tensor) -> Tensor:
        light = x.flatten(1).mean(dim=1)
        return torch.stack([light.log(), torch.ones_like(light)], dim=1)  # NaN where the mean is negative


def test_what_is_not_finite_is_a_vote_for_no_class() -> None:
    defense = SmoothedClassifier(Broken(), 0.5, draws=200)
    torch.manual_seed(0)
    x = torch.stack([torch.full((1, 2, 2), v) for v in (-2.0, 0.0, 2.0)])
    assert predict(defense, x).tolist() == [INVALID, ABSTAIN, 1]


def test_a_certified_radius_is_below_the_exact_one_and_in_it_one_call_answers() -> None:
    defense, distance = smoothed(), [0.25, 0.4, 0.6, 0.8] * 25
    x, y = at_distance(distance), torch.ones(100, dtype=torch.int64)
    (certifier,) = defense.certifiers()
    assert not certifier.smooths
    found = certifier(defense, x, y, Lp("l2", 0.05))
    exact = torch.tensor(distance) - SIGMA * norm.ppf(defense.certifier.vote.needed)
    assert (found.radius <= exact.clamp_min(0)).all()  # each with probability 0.999
    assert (found.radius[3::4] > 0.2).all()
    assert found.certified.tolist() == (found.radius >= 0.05).tolist()
    torch.manual_seed(0)
    moved = x - found.radius.float().view(-1, 1, 1, 1) / 2  # straight to the boundary: l2 distance is the radius
    sure = found.radius > 0
    assert (predict(defense, moved)[sure] == 1).double().mean() > 0.97


def test_a_threat_that_no_vote_can_prove_is_uncertified_and_no_error() -> None:
    defense, x = smoothed(), at_distance([0.5])
    for threat in (Lp("l2", 1.9), Lp("linf", 0.9)):
        assert not defense.certifiers()[0](defense, x, torch.ones(1, dtype=torch.int64), threat).certified.any()


def test_its_view_is_the_averaged_soft_classifier() -> None:
    defense, x = smoothed(), at_distance([0.3]).requires_grad_()
    view = defense.attack_view(3000)
    assert view.cost == 3000
    torch.manual_seed(0)
    logits = view(x)
    slope = torch.autograd.grad(logits[0, 1] - logits[0, 0], x)[0]
    assert slope.isfinite().all()
    assert (slope > 0).all()
    noise = torch.linspace(1e-4, 1 - 1e-4, 20_000, dtype=torch.float64)
    lead = 2 * 0.3 + 2 * SIGMA * torch.from_numpy(norm.ppf(noise.numpy()))  # w (x + e) - b
    exact = (2 * lead).sigmoid().mean()  # the two logits are lead and -lead
    assert float(logits[0, 1].detach().exp()) == pytest.approx(float(exact), abs=0.03)


def test_it_says_what_is_inside() -> None:
    assert isinstance(smoothed(), Smoothed)
    assert smoothed().settings() == {"sigma": SIGMA, "n0": 20, "n": 2000, "alpha": 0.001, "draws": 200}
    assert [type(attack) for attack in smoothed().adaptive_attacks(Lp("l2", 1.0))] == [SmoothAdv]
    assert smoothed().adaptive_attacks(Lp("l0", 3)) == []
    assert smoothed().state_dict().keys() == HalfSpace().state_dict().keys()


@cache
def trained() -> SmoothedClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    objective = Deploy(
        GaussianAugmentation(0.25), lambda inner: SmoothedClassifier(inner, 0.25, n0=50, n=1000, draws=200)
    )
    defense = train(net, load_data("digits", "train"), objective, epochs=10, learning_rate=1e-2, device="cpu")
    assert isinstance(defense, SmoothedClassifier)
    return defense


def test_an_evaluation_agrees_with_itself_and_attacks_lie_above_the_certified_curve() -> None:
    data = load_data("digits", "test").head(25)
    curve = []
    for eps in (0.1, 0.6):
        report = evaluate(trained(), data, Lp("l2", eps), [PGD(steps=5), SmoothAdv(steps=5, samples=8)], adaptive=False,
                          certifiers=trained().certifiers())  # fmt: skip
        assert report.violations == []
        records = report.records.set_index("method")
        rows = {method: records.loc[method] for method in records.index.unique()}
        (certifier,) = (name for name in rows if name.startswith("Inside"))
        attacked = [1 - rows[name]["success"].astype(bool) for name in rows if name.startswith(("PGD", "SmoothAdv"))]
        assert len(attacked) == 2
        standing = float(min(a.mean() for a in attacked))
        certified, clean = float(rows[certifier]["certified"].mean()), float(rows["clean"]["correct"].mean())
        assert clean >= standing - 0.03 >= certified - 0.03
        curve.append((clean, standing, certified))
    assert curve[0][2] > 0.5 > curve[-1][2]
    assert curve[-1][1] < 0.7


def test_attacks_on_a_half_space_find_what_is_outside_the_ball_and_nothing_inside() -> None:
    defense, distance = smoothed(n=5000), [0.3, 0.4, 0.5] * 3
    x, y = at_distance(distance), torch.ones(9, dtype=torch.int64)
    radius = float(defense.certifiers()[0](defense, x, y, Lp("l2", 0.1)).radius[1])
    for eps, broken in ((0.99 * radius, False), (0.45, True)):
        report = evaluate(defense, (x, y), Lp("l2", eps), [PGD(steps=5)], adaptive=False,
                          certifiers=defense.certifiers())  # fmt: skip
        assert report.violations == []
        fallen = report.records[report.records["method"].str.startswith("PGD")]["success"].astype(bool)
        assert fallen[[d == 0.4 for d in distance]].all() if broken else not fallen[[d >= 0.4 for d in distance]].any()


def test_the_radius_in_the_literature_is_that_of_the_certifier_alone() -> None:
    defense, x, y = smoothed(), at_distance([0.8]), torch.ones(1, dtype=torch.int64)
    alone = RandomizedSmoothing(SIGMA, n0=20, n=2000)(defense.net, x, y, Lp("l2", 0.1)).radius
    mine = defense.certifiers()[0](defense, x, y, Lp("l2", 0.1)).radius
    assert float(alone - mine) == pytest.approx(SIGMA * norm.ppf(defense.certifier.vote.needed), abs=1e-6)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("sigma", lambda: smoothed(sigma=0.0)),
        ("draws must be a whole number", lambda: smoothed(draws=0)),
        ("raise draws", lambda: smoothed(draws=5)),
        ("alpha", lambda: smoothed(alpha=0.0)),
        ("n0", lambda: smoothed(n0=0)),
        ("stochastic", lambda: SmoothedClassifier(smoothed(), 0.5)),
    ],
)
def test_bad_arguments_are_refused(message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_noise_is_the_certifiers() -> None:
    assert smoothed().certifier.source == (GaussianNoise(SIGMA),)
    torch.manual_seed(0)
    noise = []
    net = HalfSpace()
    net.register_forward_pre_hook(lambda _, inputs: noise.append(inputs[0]))
    defense = SmoothedClassifier(net, SIGMA)
    defense.draw(torch.zeros(5000, 1, 2, 2))
    assert float(noise[0].std()) == pytest.approx(SIGMA, rel=0.05)
    assert abs(float(noise[0].mean())) < 5 * SIGMA / math.sqrt(20_000)
