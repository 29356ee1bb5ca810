"""Randomized smoothing on classifiers whose smoothed probabilities are known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from robustbench_lite.certify import (
    EarlyStopping,
    GaussianNoise,
    LaplaceNoise,
    LaplaceSmoothing,
    RandomizedSmoothing,
    UniformNoise,
    UniformSmoothing,
)
from robustbench_lite.core.models import ABSTAIN
from robustbench_lite.core.results import Status
from robustbench_lite.core.spatial import RotationTranslation
from robustbench_lite.core.threats import Lp

WEIGHT = torch.tensor([1.0, -2.0, 0.5, 1.0])
SIGMA = 0.25


class HalfSpace(nn.Module):
    """Three logits of which the first two decide by the sign of w (x - 1/2): P(class 1) = Phi(d / sigma)."""

    def forward(self, x: Tensor) -> Tensor:
        lead = (x - 0.5).flatten(1) @ WEIGHT.to(x)
        return torch.stack([-lead, lead, torch.full_like(lead, -1e9)], dim=1)


def at(*distances: float) -> Tensor:
    """Images (B, 1, 2, 2), float64, at these signed l2 distances from the boundary."""
    step = torch.tensor(distances, dtype=torch.float64)[:, None] * (WEIGHT / WEIGHT.norm()).double()
    return (0.5 + step).reshape(-1, 1, 2, 2)


def ones(x: Tensor) -> Tensor:
    return torch.ones(len(x), dtype=torch.int64)


X = at(0.3, 0.1, -0.2, 0.0)
Y = torch.tensor([1, 1, 1, 1])


def test_what_a_certificate_says():
    certificate = RandomizedSmoothing(SIGMA, n=4000)(HalfSpace(), X, Y, Lp("l2", 0.15))
    assert certificate.prediction.tolist() == [1, 1, 0, ABSTAIN]
    assert certificate.status.tolist() == [Status.VERIFIED, Status.UNKNOWN, Status.VERIFIED, Status.ABSTAINED]
    assert certificate.certified.tolist() == [True, False, False, False]
    exact = torch.tensor([0.3, 0.1, 0.2, 0.0], dtype=torch.float64)
    assert (certificate.radius <= exact).all()
    assert (certificate.radius >= (exact - 0.03).clamp_min(0)).all()
    assert (certificate.kind, certificate.confidence, certificate.samples.tolist()) == (
        "probabilistic",
        0.999,
        [4100] * 4,
    )


@pytest.mark.parametrize("kind", [RandomizedSmoothing, UniformSmoothing, LaplaceSmoothing])
@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_radii_stay_below_the_distance_of_the_smoothed_boundary(kind, norm):
    """By symmetry the smoothed classifier has the half-space's own boundary, at |margin| / |w|_dual in each norm."""
    dual = {"l2": 2, "l1": math.inf, "linf": 1}[norm]
    x = at(*np.linspace(0.02, 0.4, 20))
    margin = (x - 0.5).flatten(1) @ WEIGHT.double()
    exact = margin / torch.linalg.vector_norm(WEIGHT.double(), dual)
    found = kind(SIGMA, n=5000, alpha=1e-6).radius(HalfSpace(), x, ones(x), norm)
    assert (found <= exact).all()
    assert found.max() > 0.05 * exact.max()


@pytest.mark.parametrize("noise", [GaussianNoise(0.7), UniformNoise(1.3), LaplaceNoise(0.4)])
@pytest.mark.parametrize("p", [0.55, 0.7, 0.9, 0.97])
def test_radii_of_the_noises_are_those_of_neyman_and_pearson(noise, p):
    """In one dimension, numerically: the least mass that a set of mass p can keep when the noise is shifted by R."""
    law = {
        GaussianNoise: stats.norm(0, 0.7),
        UniformNoise: stats.uniform(-1.3, 2.6),
        LaplaceNoise: stats.laplace(0, 0.4),
    }
    density = law[type(noise)].pdf
    grid, width = np.linspace(-12, 12, 480_001, retstep=True)

    def kept(shift: float) -> float:
        here, there = density(grid) * width, density(grid - shift) * width
        order = np.argsort(-np.divide(here, there, out=np.full_like(here, 1e300), where=there > 0), kind="stable")
        take = np.searchsorted(np.cumsum(here[order]), p)
        return float(there[order][:take].sum())

    radius = float(noise.radius(np.array(p)))
    assert kept(radius) == pytest.approx(0.5, abs=1e-3)
    assert kept(0.9 * radius) > 0.5 + 1e-3
    assert float(noise.probability(radius)) == pytest.approx(p, abs=1e-12)
    assert np.isnan(noise.radius(np.array(0.49)))


@pytest.mark.parametrize("noise", [GaussianNoise(0.7), UniformNoise(1.3), LaplaceNoise(0.4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_has_its_distribution(noise, dtype):
    slots = torch.empty(50, 400, dtype=dtype)
    noise.fill_(slots, torch.Generator().manual_seed(3))
    law = {
        GaussianNoise: stats.norm(0, 0.7),
        UniformNoise: stats.uniform(-1.3, 2.6),
        LaplaceNoise: stats.laplace(0, 0.4),
    }
    assert slots.dtype == dtype
    assert stats.kstest(slots.flatten().double().numpy(), law[type(noise)].cdf).pvalue > 1e-3
    assert abs(np.corrcoef(slots[0].numpy(), slots[1].numpy())[0, 1]) < 0.2


@pytest.mark.parametrize(("n", "ceiling"), [(100, 1.5005), (1000, 2.4633), (10_000, 3.1986), (100_000, 3.8115)])
def test_the_ceiling_of_clopper_and_pearson(n, ceiling):
    method = RandomizedSmoothing(2.0, n=n)
    assert method.largest_radius("l2", X.shape[1:]) == pytest.approx(2 * ceiling, abs=1e-4)
    if n <= 1000:
        sure = at(1e6)
        assert method.radius(HalfSpace(), sure, ones(sure), "l2", bounds=(-1e7, 1e7)).item() == pytest.approx(
            2 * ceiling, abs=1e-4
        )


def counting(model: nn.Module, calls: list[Tensor]) -> nn.Module:
    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(x.clone())
            return model(x)

    return Counting()


def test_the_draws_of_a_sample_are_its_own():
    """Neither batch size, nor memory budget, nor the other samples, nor more draws change what a sample meets."""
    x, indices = at(0.2, 0.1, 0.05), torch.tensor([7, 3, 5])
    method = RandomizedSmoothing(SIGMA, n0=200, n=1000)
    whole = method.votes(HalfSpace(), x, indices=indices)
    for size, budget in ((1, None), (2, 10_000), (3, 1)):
        small = RandomizedSmoothing(SIGMA, n0=200, n=1000, memory_budget=budget)
        cut = small.votes(HalfSpace(), x, indices=indices, batch_size=size)
        assert torch.equal(cut.counts, whole.counts)
        assert torch.equal(cut.selection, whole.selection)
    alone = method.votes(HalfSpace(), x[1:2], indices=indices[1:2])
    assert torch.equal(alone.counts[0], whole.counts[1])
    longer = RandomizedSmoothing(SIGMA, n0=200, n=1500).votes(HalfSpace(), x, indices=indices)
    assert torch.equal(longer.selection, whole.selection)
    assert (longer.counts >= whole.counts).all()
    assert not torch.equal(whole.counts[0], method.votes(HalfSpace(), x[:1], indices=indices[1:2]).counts[0])


def test_one_seed_one_answer_and_fresh_draws_for_the_measurement():
    method, x, threat = RandomizedSmoothing(SIGMA, n0=500, n=500), at(0.1, 0.1), Lp("l2", 0.05)
    first, again, other = (
        method.votes(HalfSpace(), x, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first.counts, again.counts)
    assert not torch.equal(first.counts, other.counts)
    assert not torch.equal(first.counts[0], first.counts[1])
    seen: list[Tensor] = []
    method(counting(HalfSpace(), seen), x[:1], Y[:1], threat)
    copies = torch.cat([batch for batch in seen if len(batch) > 4])
    assert len(copies.flatten(1).unique(dim=0)) == len(copies) == 1000
    source = torch.Generator().manual_seed(1)
    method(HalfSpace(), x, Y[:2], threat, generator=source)
    assert not torch.equal(method.votes(HalfSpace(), x, generator=source).counts, first.counts)


def test_the_copies_are_noise_around_the_image_and_are_not_clipped():
    seen: list[Tensor] = []
    x = at(0.1)
    RandomizedSmoothing(SIGMA, n0=1, n=4000).votes(counting(HalfSpace(), seen), x)
    noise = (torch.cat([batch for batch in seen if len(batch) > 4]) - x).numpy()
    for coordinate in noise.reshape(len(noise), -1).T:
        assert stats.kstest(coordinate, stats.norm(0, SIGMA).cdf).pvalue > 1e-4
    assert (noise + x.numpy()).max() > 1


def test_coverage_of_clopper_and_pearson():
    """1,000 votes on one image, whose true probability is known: the bound exceeds it in a share alpha of them."""
    p, alpha, trials = 0.8, 0.1, 1000
    x = at(SIGMA * stats.norm.ppf(p)).expand(trials, 1, 2, 2).contiguous()
    found = RandomizedSmoothing(SIGMA, n=500, alpha=alpha).radius(HalfSpace(), x, ones(x), "l2")
    wrong = int((found > SIGMA * stats.norm.ppf(p)).sum())
    assert stats.binomtest(wrong, trials, alpha, "greater").pvalue > 1e-3
    assert wrong > 0.05 * trials  # the bound is not vacuous either


def test_early_stopping_keeps_its_error_budget_and_saves_draws():
    p0, alpha, trials = stats.norm.cdf(1), 0.1, 500
    method = RandomizedSmoothing(SIGMA, n=3000, alpha=alpha, stopping=EarlyStopping())
    on_the_edge = at(SIGMA * (1 - 1e-9)).expand(trials, 1, 2, 2).contiguous()  # the claim R >= sigma is just false
    false = method(HalfSpace(), on_the_edge, ones(on_the_edge), Lp("l2", SIGMA))
    assert stats.binomtest(int(false.certified.sum()), trials, alpha, "greater").pvalue > 1e-3
    assert (false.radius > SIGMA).sum() == false.certified.sum()
    early = method(HalfSpace(), on_the_edge, ones(on_the_edge), Lp("l2", SIGMA * stats.norm.ppf(0.82)))
    assert (early.samples < 3100).double().mean() > 0.2  # the radius is read off at a time that the votes have chosen
    assert stats.binomtest(int((early.radius > SIGMA).sum()), trials, alpha, "greater").pvalue > 1e-3
    held = at(SIGMA * stats.norm.ppf(0.9)).expand(200, 1, 2, 2).contiguous()
    method = RandomizedSmoothing(SIGMA, stopping=EarlyStopping())
    true = method(HalfSpace(), held, ones(held), Lp("l2", SIGMA))
    assert true.certified.all()
    assert true.samples.double().mean() <= 1500
    lost = at(SIGMA * stats.norm.ppf(p0 - 0.1)).expand(50, 1, 2, 2).contiguous()
    refuted = method(HalfSpace(), lost, ones(lost), Lp("l2", SIGMA))
    assert not refuted.certified.any()
    assert refuted.samples.max() < 3000


def test_early_stopping_does_not_depend_on_the_company():
    x = at(0.35, 0.3, 0.26, 0.1)
    method, threat = RandomizedSmoothing(SIGMA, n=5000, stopping=EarlyStopping()), Lp("l2", 0.25)
    whole = method(HalfSpace(), x, ones(x), threat)
    assert len(whole.samples.unique()) > 2
    cut = method(HalfSpace(), x, ones(x), threat, batch_size=1)
    assert torch.equal(cut.samples, whole.samples)
    assert torch.equal(cut.radius, whole.radius)


def test_predict_is_the_binomial_test():
    x, n, alpha = at(*np.linspace(-0.05, 0.05, 60)), 384, 0.05
    method = RandomizedSmoothing(SIGMA, n=n, alpha=alpha)
    votes: list[Tensor] = []
    labels = method.predict(counting(HalfSpace(), votes), x, batch_size=1)
    assert {-1, 0, 1} == set(labels.tolist())
    answers = HalfSpace()(torch.cat([batch for batch in votes if len(batch) > 4])).argmax(1).reshape(60, n)
    for label, row in zip(labels.tolist(), answers, strict=True):
        one = int(row.sum())
        clear = stats.binomtest(max(one, n - one), n, 0.5).pvalue <= alpha
        assert label == (int(one > n - one) if clear else ABSTAIN)
    assert method.predict(HalfSpace(), x[:0]).shape == (0,)


def test_answers_that_are_no_class_count_against_the_class():
    class Refuses(HalfSpace):
        def predict(self, x: Tensor) -> Tensor:
            return torch.where(x[:, 0, 0, 0] > 0.5, ABSTAIN, 1)

    class Breaks(HalfSpace):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / (x[:, 0, 0, :1] < 0.5)

    x = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    for model in (Refuses(), Breaks()):
        votes = RandomizedSmoothing(SIGMA, n=4000).votes(model, x)
        assert votes.counts.sum().item() == pytest.approx(2000, abs=200)
        assert votes.draws.item() == 4000


def test_one_eps_a_sample_an_empty_batch_and_max_eps():
    x = at(0.3, 0.3)
    method = RandomizedSmoothing(SIGMA, n=2000)
    found = method(HalfSpace(), x, ones(x), Lp("l2", torch.tensor([0.1, 0.4])))
    assert found.certified.tolist() == [True, False]
    assert method.radius(HalfSpace(), x, ones(x), "l2", max_eps=0.07).tolist() == [0.07, 0.07]
    assert method.radius(HalfSpace(), x, ones(x) - 1, "l2").tolist() == [0, 0]
    assert method(HalfSpace(), x[:0], Y[:0], Lp("l2", 0.1)).status.shape == (0,)
    assert method.radius(HalfSpace(), x[:0], Y[:0], "l2").shape == (0,)


def test_a_model_is_left_as_it_was_and_asked_in_eval_mode():
    net = nn.Sequential(nn.Dropout(0.9), HalfSpace()).train()
    x = at(0.3)
    assert RandomizedSmoothing(SIGMA, n=1000)(net, x, ones(x), Lp("l2", 0.1)).certified.all()
    assert net.training


@pytest.mark.gpu
def test_a_gpu_finds_what_a_cpu_finds():
    x = at(*np.linspace(0.05, 0.4, 40)).float()
    method = RandomizedSmoothing(SIGMA, n=5000, alpha=1e-6)
    host, card = method.votes(HalfSpace(), x), method.votes(HalfSpace(), x.cuda())
    assert (host.counts - card.counts.cpu()).abs().max() < 5 * 5000**0.5
    again = method.votes(HalfSpace(), x.cuda(), batch_size=7)
    assert torch.equal(card.counts, again.counts)
    early = RandomizedSmoothing(SIGMA, stopping=EarlyStopping())
    found = early(HalfSpace(), x.cuda(), ones(x).cuda(), Lp("l2", 0.2))
    assert found.certified[-1]
    assert not found.certified[0]


class Stochastic(HalfSpace):
    stochastic = True


class Dice(HalfSpace):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(len(x), 3)


class Counter(HalfSpace):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (-1) ** self.calls


class Mixes(HalfSpace):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class OneLogit(HalfSpace):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :1]


class InPlace(HalfSpace):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


class Flat(HalfSpace):
    def predict(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Stochastic(), "Stochastic is stochastic"),
        (Dice(), "stochastic or keeps a state"),
        (Counter(), "stochastic or keeps a state"),
        (Mixes(), "depends on the other images"),
        (OneLogit(), "at least 2 classes"),
        (InPlace(), "changes its input in place"),
        (Flat(), "labels of shape"),
    ],
)
def test_base_models_that_cannot_be_smoothed(model, message):
    with pytest.raises(ValueError, match=message):
        RandomizedSmoothing(SIGMA, n=100)(model, at(0.1), Y[:1], Lp("l2", 0.05))


class Sparse(nn.Module):
    """Ten logits, of which at most two are not 0, with the rounding of another batch size where they are."""

    def __init__(self, rounding: float) -> None:
        super().__init__()
        self.rounding = rounding

    def forward(self, x: Tensor) -> Tensor:
        logits = HalfSpace()(x)[:, :2].relu() * (1 + self.rounding / len(x))
        return torch.cat([logits, torch.zeros_like(logits).repeat(1, 4)], dim=1)


class Probabilities(Sparse):
    def forward(self, x: Tensor) -> Tensor:
        tiny = torch.full((len(x), 8), 1e-12 / len(x)).to(x)  # their rounding is large beside themselves
        return torch.cat([HalfSpace()(x)[:, :2].sigmoid() * (1 + self.rounding / len(x)), tiny], dim=1)


@pytest.mark.parametrize("kind", [Sparse, Probabilities])
def test_a_sound_model_is_told_from_one_that_is_not_by_the_size_of_what_decides(kind):
    method = RandomizedSmoothing(SIGMA, n=1000)
    assert method(kind(1e-3), at(0.3), Y[:1], Lp("l2", 0.1)).certified.item()
    with pytest.raises(ValueError, match="depends on the other images"):
        method(kind(0.5), at(0.3), Y[:1], Lp("l2", 0.1))


def test_a_parameter_that_is_not_finite_is_named():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    net[1].weight.data[2, 1] = math.nan
    method = RandomizedSmoothing(SIGMA, n=100)
    for call in (method.votes, method.predict):
        with pytest.raises(ValueError, match=r"parameter '1\.weight' .* NaN"):
            call(net, X)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma": "0.25"}, "sigma must be a number, got '0.25'"),
        ({"sigma": True}, "sigma must be a number"),
        ({"sigma": 1.0, "alpha": "0.1"}, "alpha must be a number"),
        ({"sigma": 1.0, "n": True}, "n must be a whole number"),
        ({"sigma": 1.0, "stopping": "early"}, r"stopping must be FixedSampleSize\(\) or EarlyStopping\(\)"),
        ({"sigma": 0.0}, "sigma must be > 0"),
        ({"sigma": -1.0}, "sigma must be > 0"),
        ({"sigma": math.nan}, "sigma must be > 0"),
        ({"sigma": 1.0, "alpha": 0.0}, "alpha must lie in"),
        ({"sigma": 1.0, "alpha": 1.0}, "alpha must lie in"),
        ({"sigma": 1.0, "n0": 0}, "n0 must be a whole number"),
        ({"sigma": 1.0, "n": 0}, "n must be a whole number"),
        ({"sigma": 1.0, "n": 10.5}, "n must be a whole number"),
        ({"sigma": 1.0, "memory_budget": 0}, "memory budget"),
    ],
)
def test_settings_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        RandomizedSmoothing(**arguments)
    with pytest.raises(ValueError, match="half_width must be > 0"):
        UniformSmoothing(0)
    with pytest.raises(ValueError, match="growth must be >= 1"):
        EarlyStopping(0.5)


def test_threats_that_cannot_be_certified():
    method = RandomizedSmoothing(SIGMA, n=100)
    assert method.supports(Lp("l2", 0.1))
    for threat in (Lp("l0", 2), Lp("l2", None), RotationTranslation()):
        assert not method.supports(threat)
    with pytest.raises(ValueError, match="does not support"):
        method(HalfSpace(), X, Y, Lp("l0", 2))
    with pytest.raises(ValueError, match="certifies l2, l1, linf"):
        method.radius(HalfSpace(), X, Y, "l0")
    with pytest.raises(ValueError, match=r"n = 100 draws .* l2 radius of at most 0\.375"):
        method(HalfSpace(), X, Y, Lp("l2", 0.4))
    with pytest.raises(ValueError, match="n = 100 draws"):
        RandomizedSmoothing(SIGMA, n=100, stopping=EarlyStopping())(HalfSpace(), X, Y, Lp("l2", 0.37))
    with pytest.raises(ValueError, match="labels must be in 0"):
        method(HalfSpace(), X, Y + 2, Lp("l2", 0.1))
    few = RandomizedSmoothing(SIGMA, n=9)  # 0.001^(1/9) < 1/2
    for call in (lambda: few(HalfSpace(), X, Y, Lp("l2", 0.0)), lambda: few.radius(HalfSpace(), X, Y, "l2")):
        with pytest.raises(ValueError, match=r"n = 9 draws .* no answer"):
            call()
    with pytest.raises(ValueError, match=r"n = 9 draws .* no answer"):
        few.largest_radius("l2", X.shape[1:])
    assert RandomizedSmoothing(SIGMA, n=10).largest_radius("l2", X.shape[1:]) > 0
    with pytest.raises(ValueError, match="certifies l2, l1, linf"):
        method.largest_radius("l0", X.shape[1:])


def test_votes_prove_nothing_about_threats_that_are_not_supported():
    method = RandomizedSmoothing(SIGMA, n=1000)
    votes = method.votes(HalfSpace(), X)
    for read in (lambda threat: method.certify_votes(votes, Y, threat), lambda t: method.p_values(votes, t)):
        for threat in (Lp("l0", 2), Lp("l2", None), RotationTranslation()):
            with pytest.raises(ValueError, match="does not support"):
                read(threat)
        with pytest.raises(ValueError, match="one value for each of the 4 images"):
            read(Lp("l2", torch.tensor([0.1])))
        with pytest.raises(ValueError, match="wider than the whole image range"):
            read(Lp("l2", 3.0))
    for labels, message in (
        (Y[:1], r"shape \(4,\)"),
        (Y + 2, r"labels must be in 0 \.\. 2"),
        (Y - 2, "labels must be"),
    ):
        with pytest.raises(ValueError, match=message):
            method.certify_votes(votes, labels, Lp("l2", 0.1))


def test_arguments_of_radius_and_votes():
    method = RandomizedSmoothing(SIGMA, n=100)
    for top in (-1.0, 0.0, math.nan):
        with pytest.raises(ValueError, match="max_eps must be positive"):
            method.radius(HalfSpace(), X, Y, "l2", max_eps=top)
    for call in (
        lambda: method.radius(HalfSpace(), X, Y, "l2", batch_size=0),
        lambda: method.votes(HalfSpace(), X, batch_size=0),
        lambda: method.predict(HalfSpace(), X, batch_size=0),
    ):
        with pytest.raises(ValueError, match="batch_size must be at least 1"):
            call()
