"""PixelDP: the noise layer of training, answer and certificate are one and the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest, laplace, norm
from torch import Tensor, nn

from robustbench_lite.certify import GaussianNoise, Inside, LaplaceNoise, PixelDP
from robustbench_lite.certify.votes import Votes
from robustbench_lite.core.models import predict
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp
from robustbench_lite.data.base import Dataset
from robustbench_lite.defenses import PixelDPClassifier, PixelDPTraining, PixelDPVote
from robustbench_lite.defenses.base import Batch, Step
from robustbench_lite.evaluation import evaluate
from robustbench_lite.training import train

SCALE = 0.4


class HalfSpace(nn.Module):
    """A first layer that doubles, and class 1 where w x > b after it; |w| = 2 in four values."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(self.first.weight, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        lead = self.first(x).flatten(1).sum(dim=1) - 4
        return torch.stack([-lead, lead], dim=1)


def at_distance(distance: list[float]) -> Tensor:
    """Images (B, 1, 2, 2) at these l2 distances from the boundary, class 1 where positive."""
    return torch.tensor([0.5 + d / 2 for d in distance]).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()


def classifier(layer: str | None, noise: str = "gaussian", **other: Any) -> PixelDPClassifier:
    settings: dict[str, Any] = {"n0": 20, "n": 4000, "draws": 500}
    return PixelDPClassifier(HalfSpace(), SCALE, layer, noise, **(settings | other)).eval()


def mechanism(draws: Tensor) -> Any:
    """Where the noise must be: recorded at the first layer's output, beyond its clean value."""
    return draws.flatten().double().numpy()


@pytest.mark.parametrize(("noise", "law"), [("gaussian", norm), ("laplace", laplace)])
@pytest.mark.parametrize("layer", [None, "first"])
def test_training_and_answer_add_the_same_noise_in_the_same_place(noise: str, law: Any, layer: str | None) -> None:
    x, seen = at_distance([0.1]).expand(2000, 1, 2, 2), []
    defense = classifier(layer, noise)
    objective = PixelDPTraining(SCALE, layer, noise)
    batch = Batch(x, torch.ones(2000, dtype=torch.int64), torch.arange(2000))
    streams = Streams.from_generator(None, batch.indices)
    torch.manual_seed(0)
    for ask in (
        lambda: defense.draw(x),
        lambda: objective.loss(defense.net, batch, Step(0, 1, 0), None, streams),
    ):
        leads: list[Tensor] = []
        handle = defense.net.register_forward_hook(lambda _, __, out, leads=leads: leads.append(out[:, 1].detach()))
        ask()
        handle.remove()
        seen.append(leads[0] - 0.4)  # the clean lead at 0.1 from the boundary: 2 * (4 * 0.55) - 4
    gain = 1.0 if layer else 2.0  # noise at the input is doubled by the layer
    for values in seen:
        four = law.rvs(scale=gain * SCALE, size=(200_000, 4), random_state=0).sum(axis=1)
        assert float(values.std()) == pytest.approx(four.std(), rel=0.06)
        assert kstest(mechanism(values), four).pvalue > 1e-4
    assert not defense.net._forward_hooks
    assert not defense.net.first._forward_hooks


@pytest.mark.parametrize("layer", [None, "first"])
def test_votes_follow_the_closed_form_and_so_do_the_certificates(layer: str | None) -> None:
    defense, distance, draws = classifier(layer), 0.15, 4000
    deviation = SCALE / (2 if layer else 1)  # of the noise, seen from the input
    p = float(norm.cdf(distance / deviation))
    torch.manual_seed(0)
    mine = defense.votes(at_distance([distance]), draws)[0, :2]
    theirs = defense.certifier.votes(defense.net, at_distance([distance])).counts[0]
    for counts in (mine, theirs):
        assert chisquare(counts, [draws * (1 - p), draws * p]).pvalue > 1e-4


@pytest.mark.parametrize("noise", ["gaussian", "laplace"])
def test_the_layers_sensitivity_is_measured_and_divides_the_radius(noise: str) -> None:
    x, y = at_distance([0.6] * 4), torch.ones(4, dtype=torch.int64)
    threat = Lp("l2" if noise == "gaussian" else "l1", 0.01)
    after = classifier("first", noise, n0=50)
    for gain in (1.0, 2.0, 4.0):
        nn.init.constant_(after.net.first.weight, gain)
        votes = after.certifier.votes(after.net, x)
        name = threat.norm
        assert votes.sensitivity[name] == pytest.approx(gain)
        found = after.certifier.certify_votes(votes, y, threat)
        bare = PixelDPVote(after.certifier.noise, None, after.draws, n0=50, n=4000)
        at_layer = Votes(votes.counts, votes.counts, 50, votes.draws, votes.shape, bare.source)
        assert torch.allclose(found.radius * gain, bare.certify_votes(at_layer, y, threat).radius)


def test_the_radius_is_pixel_dps_with_the_rival_raised_by_what_a_vote_needs() -> None:
    n, draws, alpha = 100_000, 1000, 0.001
    lead = math.sqrt(2 * math.log(2 / alpha) / draws)
    mine, theirs = (
        PixelDPVote(GaussianNoise(SCALE), None, draws, n=n),
        PixelDP(GaussianNoise(SCALE), n=n),
    )
    shape = torch.Size((1, 2, 2))
    p1, p2 = np.array([0.99, 0.9, 0.6, 0.52]), np.array([0.01, 0.1, 0.4, 0.48])
    counts = torch.zeros(4, 2, dtype=torch.int64)
    votes = Votes(counts, counts, 1, torch.full((4,), n), shape, mine.source)
    found = mine.radii(p1, p2, "l2", votes)
    assert np.isnan(found[-1])
    assert found[:3] == pytest.approx(theirs.radii(p1[:3], p2[:3] + lead, "l2", votes))
    assert (found[:3] <= theirs.radii(p1[:3], p2[:3], "l2", votes)).all()


class Broken(nn.Module):
    """Class 0 where the first value is at most 1/2, and not finite above."""

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, 0, 0, 0]
        return torch.stack([torch.where(first > 0.5, torch.nan, 1.0), torch.zeros_like(first)], dim=1)


@pytest.mark.parametrize(("p", "certified"), [(0.54, False), (0.85, True)])
def test_answers_that_are_not_finite_are_a_rival(p: float, certified: bool) -> None:
    """They win a vote like a class: from probability p the answer turns after Phi^-1(p) deviations."""
    scale, y = 0.4, torch.zeros(1, dtype=torch.int64)
    defense = PixelDPClassifier(Broken(), scale, n=10_000, draws=2000).eval()
    distance = scale * float(norm.ppf(p))
    x = torch.full((1, 1, 2, 2), 0.5 - distance)
    (certifier,) = defense.certifiers()
    found = certifier(defense, x, y, Lp("l2", 0.001))
    assert bool(found.certified) == certified
    assert float(found.radius) < distance
    torch.manual_seed(0)
    x[:, :, 0, 0] += found.radius.float()
    assert not certified or all(int(predict(defense, x)) == 0 for _ in range(20))


@pytest.mark.parametrize(("classes", "draws"), [(2, 200), (10, 500)])
def test_that_lead_is_enough_for_a_vote(classes: int, draws: int) -> None:
    alpha, trials = 0.05, 20_000
    lead = math.sqrt(2 * math.log(classes / alpha) / draws)
    p = np.full(classes, (1 - lead) / classes)
    p[0] += lead
    counts = np.random.default_rng(0).multinomial(draws, p, trials)
    assert (counts[:, 1:].max(axis=1) >= counts[:, 0]).mean() <= alpha


def test_a_certified_image_keeps_its_answer_within_its_radius() -> None:
    defense = classifier("first", draws=1000)
    x, y = at_distance([0.3, 0.5] * 10), torch.ones(20, dtype=torch.int64)
    (certifier,) = defense.certifiers()
    assert isinstance(certifier, Inside)
    found = certifier(defense, x, y, Lp("l2", 0.05))
    assert (found.radius > 0.02).all()
    assert (found.radius < torch.tensor([0.3, 0.5] * 10)).all()
    torch.manual_seed(0)
    moved = x - found.radius.float().view(-1, 1, 1, 1) / 2
    assert (predict(defense, moved) == 1).all()


def test_an_evaluation_agrees_with_itself() -> None:
    defense, distance = classifier("first"), [0.02, 0.2, 0.6] * 4
    x, y = at_distance(distance), torch.ones(12, dtype=torch.int64)
    report = evaluate(defense, (x, y), Lp("l2", 0.05))
    assert report.violations == []
    records = report.records.set_index("method")
    certified = next(name for name in records.index.unique() if name.startswith("Inside"))
    attacked = next(name for name in records.index.unique() if name.startswith("PGD"))
    near = np.array([d < 0.05 for d in distance])
    assert records.loc[attacked, "success"].astype(bool).to_numpy()[near].all()
    assert not records.loc[certified, "certified"].astype(bool).to_numpy()[near].any()
    assert records.loc[certified, "certified"].astype(bool).to_numpy()[2::3].all()


def test_the_projection_makes_a_kernel_a_parseval_frame_and_leaves_one_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(80, 3))
    nn.init.normal_(net[0].weight, std=0.2)
    others = net[2].weight.clone()
    objective = PixelDPTraining(SCALE, "0", parseval=0.1)
    for _ in range(300):
        objective.after_step(net, None)
    sizes = torch.linalg.svdvals(net[0].weight.flatten(1).detach())
    assert torch.allclose(sizes, torch.ones(5), atol=1e-4)
    assert torch.equal(net[2].weight, others)
    before = net[0].weight.clone()
    objective.after_step(net, None)
    assert torch.allclose(net[0].weight, before, atol=1e-5)


@pytest.mark.parametrize(("layer", "parseval"), [("0", 0.0), (None, 0.1)])
def test_without_a_step_or_a_layer_nothing_is_projected(layer: str | None, parseval: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(80, 3))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    PixelDPTraining(SCALE, layer, parseval=parseval).after_step(net, None)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def dataset() -> Dataset:
    x = at_distance([-0.3, 0.3] * 20)
    return Dataset("two", "train", x, torch.arange(40) % 2, torch.arange(40), 2)


def test_training_keeps_the_layer_near_norm_one_where_noise_would_have_it_grow() -> None:
    sizes = []
    for parseval in (0.0, 0.1):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 1, 2, bias=False), nn.Flatten(), nn.Linear(1, 2))
        objective = PixelDPTraining(1.0, "0", parseval=parseval)
        train(net, dataset(), objective, epochs=30, batch_size=20, learning_rate=0.05, device="cpu")
        sizes.append(float(torch.linalg.svdvals(net[0].weight.flatten(1).detach())[0]))
    assert sizes[0] > 1.8
    assert 0.8 < sizes[1] < 1.4


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("sigma", lambda: PixelDPTraining(0)),
        ("noise", lambda: PixelDPTraining(0.5, noise="uniform")),
        ("parseval", lambda: PixelDPTraining(0.5, parseval=-1)),
        ("no layer 'third'; the model has first", lambda: classifier("third")),
        ("no layer 'third'; the model has", lambda: PixelDPTraining(0.5, "third").setup(HalfSpace(), dataset())),
        ("scale", lambda: PixelDPClassifier(HalfSpace(), -1, noise="laplace")),
        ("alpha", lambda: classifier(None, alpha=2)),
        ("draws", lambda: classifier(None, draws=0)),
    ],
)
def test_bad_arguments_are_refused(message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_layer_may_be_named_by_its_number() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    assert PixelDPClassifier(net, SCALE, 1).certifier.source == (GaussianNoise(SCALE), "1")
    assert PixelDPTraining(SCALE, 0).setup(net, dataset()) is None
    with pytest.raises(ValueError, match="no layer '2'; the model has 0, 1"):
        PixelDPTraining(SCALE, 2).setup(net, dataset())


def late(inplace: bool = False) -> nn.Module:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(inplace))
    return nn.Sequential(first, nn.Flatten(), nn.BatchNorm1d(2), nn.Linear(2, 2)).eval()


@pytest.mark.parametrize("inplace", [False, True])
def test_a_layer_behind_a_relu_is_refused_before_the_training_with_those_that_are_possible(inplace: bool) -> None:
    net = late(inplace).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"layer '2' is no affine .* these are affine: 0\.0; noise can also .* input"):
        PixelDPTraining(SCALE, 2).setup(net, dataset())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    PixelDPTraining(SCALE, "0.0").setup(net, dataset())


def test_an_evaluation_lives_though_the_layer_has_no_certificate() -> None:
    defense = PixelDPClassifier(late(), SCALE, 3, n0=20, n=500, draws=100).eval()
    report = evaluate(defense, (at_distance([0.1, 0.4]), torch.ones(2, dtype=torch.int64)), Lp("l2", 0.05))
    (refused,) = [row for row in report.not_applicable if row.method.startswith("Inside")]
    assert "'3' is no affine function" in refused.reason


def test_it_says_how_to_rebuild_it() -> None:
    defense = classifier("first", "laplace")
    assert defense.settings() == {
        "scale": SCALE, "layer": "first", "noise": "laplace", "n0": 20, "n": 4000, "alpha": 0.001, "draws": 500
    }  # fmt: skip
    assert defense.certifier.source == (LaplaceNoise(SCALE), "first")
    assert not isinstance(defense.attack_view(3), PixelDPClassifier)
