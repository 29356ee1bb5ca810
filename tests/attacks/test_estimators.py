"""Gradient estimators against closed forms and back-propagation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustbench_lite.attacks import DCT, FiniteDifferenceEstimator, NESEstimator, Pixels, SPSAEstimator, Tiles
from robustbench_lite.core.goals import Untargeted
from robustbench_lite.core.losses import cross_entropy, margin
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp


def ask(estimator, model, x, y=None, loss=margin, names=None, seed=0, **options):
    """Return the estimate at x and the oracle that was asked."""
    y = torch.zeros(len(x), dtype=torch.int64) if y is None else y
    streams = Streams.from_generator(
        torch.Generator().manual_seed(seed), torch.arange(len(x)) if names is None else names
    )
    threat = Lp("linf", 0.3)
    with Oracle(model, x, Untargeted(y), threat, access=Access.SCORES, stop="never", **options) as oracle:
        return estimator(oracle, x, torch.arange(len(x)), loss, streams), oracle


def linear(size, classes=2, seed=0):
    weight = torch.randn(classes, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (lambda x: x.flatten(1) @ weight.T), (weight[1] - weight[0])


@pytest.fixture
def smooth():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 4 * 3, 4)).double()


@pytest.fixture
def pictures():
    return torch.rand(5, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def true_gradient(model, x, y, loss):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(loss(model(leaf), Untargeted(y)).sum(), leaf)[0]


@pytest.mark.parametrize(("pairs", "side"), [(25, 8), (100, 8), (25, 28), (100, 28), (300, 28)])
@pytest.mark.parametrize("kind", ["nes", "spsa"])
def test_cosine_with_the_gradient_of_a_linear_model(kind, pairs, side):
    """E |g|^2 / |w|^2 is (p + d + 1) / p for normal directions, (p + d - 1) / p for signs, and E <g, w> / |w|^2 = 1."""
    size, draws = side * side, 24
    model, w = linear(size)
    estimator = NESEstimator(2 * pairs) if kind == "nes" else SPSAEstimator(2 * pairs)
    gradient, _ = ask(estimator, model, torch.full((draws, 1, side, side), 0.5, dtype=torch.float64))
    cosine = F.cosine_similarity(gradient.flatten(1), w.unsqueeze(0))
    expected = math.sqrt(pairs / (pairs + size + (1 if kind == "nes" else -1)))
    error = cosine.std() / math.sqrt(draws)
    assert abs(cosine.mean() - expected) < 4 * error + 1 / size
    length = gradient.flatten(1).norm(dim=1).square().mean() / w.square().sum()
    assert length == pytest.approx(1 / expected**2, rel=0.2)


@pytest.mark.parametrize("loss", [margin, cross_entropy])
@pytest.mark.parametrize("basis", [Pixels(), DCT(0.5), Tiles(2)])
def test_finite_differences_are_the_gradient_on_the_span(smooth, pictures, loss, basis):
    y = torch.arange(5) % 4
    expected = basis.project(true_gradient(smooth, pictures, y, loss))
    both, _ = ask(FiniteDifferenceEstimator(1e-4, two_sided=True, basis=basis), smooth, pictures, y, loss)
    one, _ = ask(FiniteDifferenceEstimator(1e-6, basis=basis), smooth, pictures, y, loss)
    assert (both - expected).abs().max() < 1e-6
    assert (one - expected).abs().max() < 1e-5


def test_random_coordinates_are_entries_of_the_gradient(smooth, pictures):
    y = torch.arange(5) % 4
    expected = true_gradient(smooth, pictures, y, margin)
    part, oracle = ask(FiniteDifferenceEstimator(1e-4, two_sided=True, coordinates=11), smooth, pictures, y)
    asked = part != 0
    assert (asked.flatten(1).sum(dim=1) == 11).all()
    assert len({tuple(row.nonzero().flatten().tolist()) for row in asked.flatten(1)}) == 5
    assert ((part - expected) * asked).abs().max() < 1e-6
    assert (oracle.forwards == 23).all()
    whole, _ = ask(FiniteDifferenceEstimator(1e-4, two_sided=True, coordinates=1000), smooth, pictures, y)
    assert (whole - expected).abs().max() < 1e-6


@pytest.mark.parametrize("estimator", [NESEstimator(1200), SPSAEstimator(1200, 1e-3)])
def test_estimates_approach_the_gradient_of_a_curved_loss(smooth, pictures, estimator):
    y = torch.arange(5) % 4
    expected = true_gradient(smooth, pictures, y, cross_entropy)
    gradient, _ = ask(estimator, smooth, pictures, y, cross_entropy)
    assert F.cosine_similarity(gradient.flatten(1), expected.flatten(1)).min() > 0.9


ESTIMATORS = [
    NESEstimator(),
    NESEstimator(38, basis=DCT(0.5)),
    SPSAEstimator(22, basis=Tiles(2)),
    FiniteDifferenceEstimator(),
    FiniteDifferenceEstimator(two_sided=True, coordinates=13, basis=DCT(0.5)),
]
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: f"{type(e).__name__}-{e.basis}")


@every_estimator
def test_an_estimate_lies_in_the_span_of_its_basis(estimator, smooth, pictures):
    gradient, _ = ask(estimator, smooth, pictures)
    assert torch.allclose(estimator.basis.project(gradient), gradient, atol=1e-10)
    assert (gradient != 0).any()


@every_estimator
def test_a_batch_of_32_equals_32_batches_of_one(estimator, smooth):
    x = torch.rand(32, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    whole, _ = ask(estimator, smooth, x, loss=cross_entropy, names=torch.arange(70, 102))
    for i in range(32):
        alone, _ = ask(estimator, smooth, x[i : i + 1], loss=cross_entropy, names=torch.tensor([70 + i]))
        assert torch.allclose(alone[0], whole[i], rtol=0, atol=1e-10)


@every_estimator
def test_each_forward_is_paid(estimator, smooth, pictures):
    seen = []
    smooth.register_forward_hook(lambda _, __, logits: seen.append(len(logits)))
    _, oracle = ask(estimator, smooth, pictures)
    assert (oracle.forwards == estimator.cost(oracle)).all()
    assert sum(seen) == oracle.forwards.sum()


@every_estimator
def test_a_sample_that_falls_or_cannot_pay_asks_no_probes(estimator, smooth, pictures):
    y = smooth(pictures).argmax(dim=1)
    y[0] = (y[0] + 1) % 4
    with Oracle(smooth, pictures, Untargeted(y), Lp("linf", 0.3), access=Access.SCORES, max_queries=200) as oracle:
        streams = Streams(0, list(range(5)), torch.device("cpu"))
        gradient = estimator(oracle, pictures, torch.arange(5), margin, streams)
    assert oracle.forwards.tolist() == [1] + [estimator.cost(oracle)] * 4
    assert (gradient[0] == 0).all()
    assert (gradient[1:] != 0).flatten(1).any(dim=1).all()
    _, poor = ask(estimator, smooth, pictures, max_queries=3)
    assert (poor.forwards == 1).all()


@every_estimator
@pytest.mark.parametrize("capacity", [1, 40])
def test_memory_bounds_the_probes_and_changes_nothing(estimator, capacity, smooth, pictures, monkeypatch):
    expected, _ = ask(estimator, smooth, pictures)
    asked = []
    scores = Oracle.scores

    def spy(self, points, *args, **kwargs):
        asked.append(len(points))
        return scores(self, points, *args, **kwargs)

    monkeypatch.setattr(Oracle, "scores", spy)
    monkeypatch.setattr(Oracle, "capacity", capacity)
    frugal, _ = ask(estimator, smooth, pictures)
    assert max(asked[1:]) <= max(capacity, 16)
    assert torch.allclose(frugal, expected, atol=1e-10)


def test_a_saturated_cross_entropy_still_has_a_slope():
    """In float32 the cross-entropy of a logit lead of 20 is exactly 0 at each probe."""
    model, w = linear(16)
    x = torch.full((1, 1, 4, 4), 0.5)
    lead = 20 - float(-(w @ x.flatten().double()))

    def confident(images):
        return model(images.double()).float() + torch.tensor([lead, 0.0])

    assert cross_entropy(confident(x), Untargeted(torch.tensor([0]))) == 0
    gradient, _ = ask(NESEstimator(2000, 0.01), confident, x, loss=cross_entropy)
    assert F.cosine_similarity(gradient.flatten().double(), w, dim=0) > 0.95


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NESEstimator(samples=7), "even number of probes.*got 7"),
        (lambda: NESEstimator(samples=0), "got 0"),
        (lambda: NESEstimator(sigma=0), "sigma must be > 0"),
        (lambda: SPSAEstimator(delta=-1), "delta must be > 0, got -1"),
        (lambda: SPSAEstimator(samples=2.0), "got 2.0"),
        (lambda: FiniteDifferenceEstimator(h="x"), "x"),
        (lambda: FiniteDifferenceEstimator(coordinates=0), "coordinates must be a whole number.*got 0"),
    ],
)
def test_settings_out_of_range_say_so(build, message):
    with pytest.raises(ValueError, match=message):
        build()
