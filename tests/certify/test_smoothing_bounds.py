"""Other bounds from the votes of randomized smoothing: Renyi divergence and differential privacy."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats
from scipy.special import ndtr, ndtri
from torch import Tensor, nn

from robustbench_lite.certify import (
    GaussianNoise,
    LaplaceNoise,
    LaplaceSmoothing,
    PixelDP,
    RandomizedSmoothing,
    RenyiSmoothing,
    UniformNoise,
    Votes,
)
from robustbench_lite.certify._sensitivity import Sensitivity
from robustbench_lite.certify.pixel_dp import gaussian_size, laplace_size
from robustbench_lite.certify.renyi_smoothing import renyi_radius
from robustbench_lite.core.models import ABSTAIN
from robustbench_lite.core.threats import Lp

SIGMA = 0.25


def one(value: float) -> np.ndarray:
    return np.array([value])


@pytest.mark.parametrize(
    ("p", "pixel_dp", "renyi", "cohen"),
    [
        (0.6, 0.0592, 0.2022, 0.2533),
        (0.8, 0.2352, 0.6742, 0.8416),
        (0.9, 0.3903, 1.0319, 1.2816),
        (0.99, 0.5549, 1.9080, 2.3263),
        (0.999, 0.5689, 2.5757, 3.0902),
        (0.9999, 0.5703, 3.1409, 3.7190),
    ],
)
def test_the_table_of_radii(p, pixel_dp, renyi, cohen):
    assert gaussian_size(one(p), one(1 - p))[0] == pytest.approx(pixel_dp, abs=5e-5)
    assert renyi_radius(one(p), one(1 - p))[0] == pytest.approx(renyi, abs=5e-5)
    assert GaussianNoise(1.0).radius(one(p))[0] == pytest.approx(cohen, abs=5e-5)


@given(st.floats(1e-9, 1 - 1e-9), st.floats(1e-3, 1 - 1e-3))
def test_pixel_dp_below_renyi_below_cohen(low, share):
    """For the same p1 > p2, Cohen's radius in its two-sided form; PixelDP is last only where p1 > 1/2."""
    p1 = 1 - low
    p2 = min(p1, 1 - p1) * share
    cohen = (ndtri(p1) - ndtri(p2)) / 2
    renyi, dp = renyi_radius(one(p1), one(p2))[0], gaussian_size(one(p1), one(p2))[0]
    assert 0 <= renyi <= cohen
    assert p1 <= 0.5 or 0 <= dp <= renyi
    if p1 - p2 > 1e-3:
        assert renyi < cohen
        assert p1 <= 0.5 or dp < renyi


def test_the_renyi_radius_is_the_supremum_over_all_orders():
    def plain(a: float, p1: float, p2: float) -> float:
        mean = ((p1 ** (1 - a) + p2 ** (1 - a)) / 2) ** (1 / (1 - a))
        return -2 / a * math.log(1 - p1 - p2 + 2 * mean)

    for p1, p2 in [(0.48, 0.15), (0.7, 0.3), (0.9, 0.01), (0.99, 0.01), (0.55, 0.44)]:
        best = optimize.minimize_scalar(
            lambda a, p1=p1, p2=p2: -plain(a, p1, p2), bounds=(1 + 1e-6, 30), method="bounded"
        )
        assert renyi_radius(one(p1), one(p2))[0] == pytest.approx(math.sqrt(-best.fun), rel=1e-6)
    p = 1 - np.array([1e-3, 1e-6, 1e-9, 1e-12, 1e-15])
    found = renyi_radius(p, 1 - p)
    assert np.isfinite(found).all()
    assert (np.diff(found) > 0).all()


def test_the_renyi_radius_stays_below_cohens_where_the_two_classes_are_next_to_equal():
    """There the rounding of the divergence, divided by 1 - order, would be a radius of its own: 1e-6 instead of 0."""
    for p in (0.01, 0.1, 0.3, 0.45, 0.49999):
        p1 = p + 10.0 ** -np.arange(5, 14)
        p2 = np.full(len(p1), p)
        # a mean value of the slope of Phi^-1, as the difference of two values is nothing but rounding here
        assert (renyi_radius(p1, p2) <= (p1 - p2) / 2 / stats.norm.pdf(ndtri(p2)) * (1 + 1e-3)).all()


@pytest.mark.parametrize("distance", [0.2, 1.0, 2.0])
def test_the_renyi_bound_holds_where_the_law_moves_its_winner(distance):
    """The step from divergence to winner, by brute force: no law whose winner is another is nearer than the bound."""
    rng, sigma = np.random.default_rng(0), 1.0
    for p in rng.dirichlet(np.ones(4), 200):
        first, second = np.sort(p)[::-1][:2]
        radius = renyi_radius(one(first), one(second))[0]
        if radius < distance:
            continue
        for q in rng.dirichlet(np.ones(4), 200):
            if q.argmax() != p.argmax():
                a = np.linspace(1.05, 8, 60)[:, None]
                divergence = np.log((q**a * p ** (1 - a)).sum(1)) / (a[:, 0] - 1)
                assert (divergence > a[:, 0] * distance**2 / (2 * sigma**2)).any()


def test_a_rival_far_below_favours_two_sided_bounds():
    """480 and 150 of 1,000 votes: CERTIFY abstains, the Renyi bound does not."""
    counts = torch.tensor([[480, 150] + [74] * 5])
    votes = Votes(counts, counts, 1000, torch.tensor([1000]), torch.Size([1, 2, 2]), (GaussianNoise(1.0),))
    y, threat = torch.tensor([0]), Lp("l2", 0.2)
    assert RandomizedSmoothing(1.0, n=1000).certify_votes(votes, y, threat).prediction.item() == ABSTAIN
    found = RenyiSmoothing(1.0, n=1000).certify_votes(votes, y, threat)
    assert found.certified.item()
    p1 = stats.binomtest(480, 1000).proportion_ci(1 - 2 * 0.001 / 7).low
    p2 = stats.binomtest(150, 1000).proportion_ci(1 - 2 * 0.001 / 7).high
    assert found.radius.item() == pytest.approx(renyi_radius(one(p1), one(p2))[0], rel=1e-6)


@given(st.floats(0.001, 1.0), st.floats(0.001, 0.5))
def test_the_gaussian_mechanism_is_private_as_the_radius_assumes(eps, delta):
    """Against the exact privacy of Gaussian noise (Balle and Wang 2018)."""
    move = eps / math.sqrt(2 * math.log(1.25 / delta))
    exact = ndtr(move / 2 - eps / move) - math.exp(eps) * ndtr(-move / 2 - eps / move)
    assert exact <= delta


def test_the_search_over_privacy_budgets_finds_the_best_one():
    for p1, p2 in [(0.6, 0.4), (0.9, 0.1), (0.8, 0.05), (0.999, 0.001)]:
        eps = np.linspace(1e-4, 1, 200_001)
        delta = (p1 - np.exp(2 * eps) * p2) / (1 + np.exp(eps))
        eps, delta = eps[delta > 0], delta[delta > 0]
        brute = (eps / np.sqrt(2 * np.log(1.25 / delta))).max()
        assert gaussian_size(one(p1), one(p2))[0] == pytest.approx(brute, rel=1e-6)
        assert laplace_size(one(p1), one(p2))[0] == pytest.approx(math.log(p1 / p2) / 2)


class Readout(nn.Module):
    """A first layer, and a half-space of its output: everything is known in closed form."""

    def __init__(self, first: nn.Module, seed: int = 0) -> None:
        super().__init__()
        self.scale, self.first = 0.5, first
        self.register_buffer("v", torch.randn(first(torch.zeros(1, 2, 5, 5)).numel(), generator=_source(seed)))

    def forward(self, x: Tensor) -> Tensor:
        lead = self.first((x - 0.4) / self.scale).flatten(1) @ self.v
        return torch.stack([-lead, lead], dim=1)


def _source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def conv(**settings: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Conv2d(2, 4, 3, **settings)


LAYERS = [{}, {"stride": 2, "padding": 1}, {"padding": 2, "dilation": 2, "groups": 2}, {"padding": 1, "bias": False}]


@pytest.mark.parametrize("settings", LAYERS)
def test_sensitivities_are_operator_norms_and_no_move_exceeds_them(settings):
    model = Readout(conv(**settings)).eval()
    found = Sensitivity(model, "first", torch.zeros(1, 2, 5, 5))
    jacobian = torch.autograd.functional.jacobian(
        lambda z: model.double().first((z - 0.4) / 0.5), torch.rand(1, 2, 5, 5).double()
    )
    matrix = jacobian.reshape(-1, 50)
    assert found.l2_to_l2 == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-6)
    assert found.l1_to_l2 == pytest.approx(float(matrix.norm(dim=0).max()), rel=1e-6)
    assert found.l1_to_l1 == pytest.approx(float(torch.linalg.matrix_norm(matrix, 1)), rel=1e-6)
    assert found.l2_to_l2 >= float(torch.linalg.matrix_norm(matrix, 2))


@pytest.mark.parametrize("noise", [GaussianNoise(SIGMA), LaplaceNoise(SIGMA)])
@pytest.mark.parametrize("layer", [None, "first"])
@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_pixel_dp_radii_stay_below_the_distance_of_the_smoothed_boundary(noise, layer, norm):
    model, source = Readout(conv(stride=2, padding=1)).double().eval(), _source(3)
    gradient = torch.autograd.functional.jacobian(lambda z: model(z)[0, 1], torch.rand(1, 2, 5, 5).double())
    x = 0.5 + 0.5 * torch.randn(60, 2, 5, 5, generator=source).double()
    y = model(x).argmax(1)
    dual = {"l2": 2, "l1": math.inf, "linf": 1}[norm]
    exact = model(x).amax(1) / torch.linalg.vector_norm(gradient.flatten(), dual)
    method = PixelDP(noise, layer, n=3000, alpha=1e-4)
    found = method.radius(model, x, y, norm, bounds=(-9, 9))
    assert (found <= exact).all()
    assert found.max() > 0
    plain = {"l2": RandomizedSmoothing(SIGMA), "l1": LaplaceSmoothing(SIGMA)}.get(norm)
    if layer is None and plain is not None and plain.noise == noise:
        votes = method.votes(model, x, bounds=(-9, 9))
        both = [m.certify_votes(votes, y, Lp(norm, 0.0, (-9, 9))).radius for m in (method, plain)]
        assert torch.equal(both[0], torch.minimum(*both))


def test_norms_reach_the_noisy_layer_by_their_own_operator_norms():
    """From the same votes the l1 radius is larger than the l2 radius by the quotient of the layer's norms."""
    model = Readout(conv(stride=2, padding=1)).double().eval()
    jacobian = torch.autograd.functional.jacobian(
        lambda z: model.first((z - 0.4) / 0.5), torch.rand(1, 2, 5, 5).double()
    )
    matrix = jacobian.reshape(-1, 50)
    quotient = float(torch.linalg.matrix_norm(matrix, 2) / matrix.norm(dim=0).max())
    assert quotient > 1.1
    method = PixelDP(GaussianNoise(SIGMA), "first", n=3000)
    x = 0.5 + 0.5 * torch.randn(8, 2, 5, 5, generator=_source(3)).double()
    votes = method.votes(model, x, bounds=(-9, 9))
    l2, l1 = (method.certify_votes(votes, model(x).argmax(1), Lp(n, 0.0, (-9, 9))).radius for n in ("l2", "l1"))
    assert (l2 > 0).any()
    torch.testing.assert_close(l1, quotient * l2, rtol=1e-6, atol=0)


def test_ceilings_ask_for_what_they_depend_on_and_unanimous_votes_reach_them():
    x, ten = torch.rand(1, 2, 5, 5, generator=_source(0)), Ten(conv())
    for method in (RenyiSmoothing(SIGMA, n=500), PixelDP(LaplaceNoise(SIGMA), n=500)):
        with pytest.raises(ValueError, match="give num_classes"):
            method.largest_radius("l2", x.shape[1:])
        ceiling = method.largest_radius("l2", x.shape[1:], 10)
        assert ceiling < method.largest_radius("l2", x.shape[1:], 2)
        assert method.radius(ten, x, torch.tensor([0]), "l2").item() == pytest.approx(ceiling, rel=1e-12)
    inside = PixelDP(GaussianNoise(SIGMA), "first", n=500)
    with pytest.raises(ValueError, match="needs the layer's sensitivity"):
        inside.largest_radius("l2", x.shape[1:], 10)
    votes = inside.votes(ten, x)
    ceiling = inside.largest_radius("l2", x.shape[1:], 10, votes.sensitivity)
    assert inside.radius(ten, x, torch.tensor([0]), "l2").item() == pytest.approx(ceiling, rel=1e-12)
    with pytest.raises(ValueError, match="needs the layer's sensitivity"):
        inside.certify_votes(replace(votes, sensitivity={}), torch.tensor([0]), Lp("l2", 0.0))
    assert inside.radius(ten, x[:0], torch.tensor([], dtype=torch.int64), "l2").shape == (0,)


def test_noise_in_the_net_is_added_to_the_layer():
    """The votes have the probability of noise at the layer: Phi(margin / (sigma |v|))."""
    model = Readout(conv(padding=1)).double().eval().requires_grad_(False)
    x = torch.rand(6, 2, 5, 5, generator=_source(5), dtype=torch.float64)
    sigma = float((model(x)[:, 1] / model.v.norm()).abs().mean())
    votes = PixelDP(GaussianNoise(sigma), "first", n=4000).votes(model, x)
    expected = ndtr((model(x)[:, 1] / model.v.norm() / sigma).numpy())
    np.testing.assert_allclose(votes.counts[:, 1].numpy() / 4000, expected, atol=0.03)
    assert not torch.equal(votes.counts[0], votes.counts[1])
    small = PixelDP(GaussianNoise(sigma), "first", n=4000, memory_budget=50_000).votes(model, x, batch_size=2)
    assert torch.equal(small.counts, votes.counts)
    assert not model.first._forward_hooks


class Bypass(Readout):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.flatten(1)[:, :2]


class Gated(Readout):
    """The input goes around the layer, but not where the layer's mean output is 1 or more."""

    def forward(self, x: Tensor) -> Tensor:
        seen = self.first((x - 0.4) / self.scale).flatten(1)
        lead = seen @ self.v
        return torch.stack([-lead, lead], 1) + x.flatten(1)[:, :2] * (1 - seen.mean(1, keepdim=True)).clamp_min(0)


class Threshold(Readout):
    """The input goes around the layer, but not where all its output is above 1/2."""

    def forward(self, x: Tensor) -> Tensor:
        seen = self.first((x - 0.4) / self.scale).flatten(1)
        lead = seen @ self.v
        return torch.stack([-lead, lead], 1) + x.flatten(1)[:, :2] * (seen < 0.5).any(1, keepdim=True)


class Peeks(Readout):
    """Its logits respect the layer, its labels do not."""

    def predict(self, x: Tensor) -> Tensor:
        return torch.where(x[:, 0, 0, 0] > 0.5, self(x).argmax(1), 0)


class Ten(Readout):
    """Always the first of ten classes."""

    def forward(self, x: Tensor) -> Tensor:
        lead = super().forward(x)[:, :1].tanh() + 2
        return torch.cat([lead, lead.new_zeros(len(x), 9)], dim=1)


class Twice(Readout):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(-x)


class Unused(Readout):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :2]


@pytest.mark.parametrize(
    ("model", "layer", "message"),
    [
        (Readout(conv()), "second", "no layer 'second'; the model has first"),
        (Readout(nn.Sequential(conv(), nn.ReLU())), "first", "no affine function"),
        (Bypass(conv()), "first", "by another way"),
        (Twice(conv()), "first", "by another way"),
        (Gated(conv()), "first", "by another way"),
        (Threshold(conv()), "first", "by another way"),
        (Peeks(conv()), "first", "by another way"),
        (Unused(conv()), "first", "does not run layer"),
    ],
)
def test_layers_whose_noise_proves_nothing(model, layer, message):
    x = torch.rand(1, 2, 5, 5)
    with pytest.raises(ValueError, match=message):
        PixelDP(GaussianNoise(SIGMA), layer, n=100)(model, x, torch.tensor([0]), Lp("l2", 0.01))
    with pytest.raises(TypeError, match="needs an nn"):
        PixelDP(GaussianNoise(SIGMA), layer, n=100).votes(lambda z: z.flatten(1)[:, :2], x)


def test_votes_under_other_noise_are_not_read():
    x = torch.rand(1, 2, 5, 5)
    votes = RandomizedSmoothing(0.5, n=100).votes(Readout(conv()), x)
    for other in (RenyiSmoothing(0.25), PixelDP(LaplaceNoise(0.5)), PixelDP(GaussianNoise(0.5), "first")):
        with pytest.raises(ValueError, match="got votes under"):
            other.certify_votes(votes, torch.tensor([0]), Lp("l2", 0.1))
    with pytest.raises(ValueError, match="noise must be GaussianNoise"):
        PixelDP(UniformNoise(1.0))
    with pytest.raises(ValueError, match="sigma must be > 0"):
        RenyiSmoothing(0.0)
    with pytest.raises(ValueError, match=r"l2 radius of at most 0\.\d+ by PixelDP"):
        PixelDP(GaussianNoise(0.5), n=100)(Readout(conv()), x, torch.tensor([0]), Lp("l2", 0.4))
