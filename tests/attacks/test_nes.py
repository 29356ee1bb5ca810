"""NES and its kin: what they find, what they pay, and the rules for their steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from robustbench_lite.attacks import (
    DCT,
    NES,
    PGD,
    SPSA,
    FiniteDifferences,
    LowFrequencyNES,
    LowFrequencyPGD,
    NESEstimator,
)
from robustbench_lite.attacks._nes_search import Adam, PlateauSteps
from robustbench_lite.core.goals import Targeted
from robustbench_lite.core.models import predict
from robustbench_lite.core.oracle import Access
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp


def linear(dims=64, seed=0):
    """A two-class linear model whose margin at the grey image is -0.5, and its weights."""
    w = torch.randn(dims, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def model(x):
        score = (x.flatten(1) - 0.5) @ w - 0.5
        return torch.stack([torch.zeros_like(score), score], dim=1)

    return model, w


def grey(count=20, side=8):
    return torch.full((count, 1, side, side), 0.5, dtype=torch.float64)


ATTACKS = [
    (NES(), 800, 1.6),
    (SPSA(), 800, 1.6),
    (FiniteDifferences(), 700, 1.001),
    (FiniteDifferences(coordinates=8, steps=150, step_size=0.02), 1500, 1.01),
    (PGD(estimator=NESEstimator(100), random_start=False), 5000, 1.5),
]


@pytest.mark.parametrize(("attack", "queries", "slack"), ATTACKS, ids=str)
def test_a_linear_model_falls_beyond_its_distance_and_not_within(attack, queries, slack):
    model, w = linear()
    x, y = grey(), torch.zeros(20, dtype=torch.int64)
    distance = 0.5 / float(w.abs().sum())
    assert attack(model, x, y, Lp("linf", distance * slack), max_queries=queries).success.all()
    assert not attack(model, x, y, Lp("linf", distance * 0.999), max_queries=queries).success.any()
    assert attack(model, x, Targeted(y + 1), Lp("linf", distance * slack), max_queries=queries).success.all()


def test_nes_climbs_in_l2_too():
    model, w = linear()
    x, y = grey(), torch.zeros(20, dtype=torch.int64)
    distance = 0.5 / float(w.norm())
    assert NES()(model, x, y, Lp("l2", distance * 1.3), max_queries=1000).success.all()
    assert not NES()(model, x, y, Lp("l2", distance * 0.999), max_queries=500).success.any()


def test_one_budget_for_each_sample():
    model, w = linear()
    x, y = grey(6), torch.zeros(6, dtype=torch.int64)
    eps = 0.5 / float(w.abs().sum()) * torch.tensor([0.9, 2.0, 0.9, 2.0, 0.9, 2.0])
    for attack in (NES(), SPSA()):
        assert attack(model, x, y, Lp("linf", eps), max_queries=1500).success.tolist() == [False, True] * 3


@pytest.mark.parametrize("attack", [NES(queries=307), SPSA(queries=400), NES(samples=10, queries=35)], ids=str)
def test_the_attacks_own_budget_counts_each_forward(attack):
    asked = []

    def stubborn(x):
        asked.append(len(x))
        score = (x.flatten(1) - 0.5).sum(dim=1)
        return torch.stack([score + 1e6, score], dim=1)

    result = attack(stubborn, grey(3), torch.zeros(3, dtype=torch.int64), Lp("linf", 0.1))
    estimates, rest = divmod(attack.queries, attack.samples + 1)
    assert (result.forwards == 1 + estimates * (attack.samples + 1) + min(rest, 1)).all()
    assert sum(asked) == result.forwards.sum()
    small = attack(stubborn, grey(3), torch.zeros(3, dtype=torch.int64), Lp("linf", 0.1), max_queries=70)
    assert small.forwards.max() <= 70


def test_nes_of_32_equals_32_of_one():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x = torch.rand(32, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y, threat = predict(net, x), Lp("linf", 0.05)
    whole = NES()(net, x, y, threat, max_queries=400)
    assert 0.1 < whole.success.double().mean() < 1
    for i in range(32):
        alone = NES()(net, x[i : i + 1], y[i : i + 1], threat, max_queries=400, indices=torch.tensor([i]))
        assert (alone.success[0], alone.forwards[0]) == (whole.success[i], whole.forwards[i])
        assert torch.allclose(alone.x_adv[0], whole.x_adv[i], atol=1e-12, rtol=0)


def steps_of(update, values, gradient=1.0, eps=0.05):
    """Return the lengths of the steps that a rule takes when the loss runs through `values` (one list a sample)."""
    x, threat = torch.full((len(values), 1, 2, 2), 0.5, dtype=torch.float64), Lp("linf", eps)
    state, lengths = update.start(x, threat), []
    for value in torch.tensor(values, dtype=torch.float64).T:
        state, step = update(state, x, value, torch.full_like(x, gradient), threat)
        lengths.append(step.flatten(1).abs().amax(dim=1))
    return torch.stack(lengths, dim=1)


def test_steps_are_cut_when_a_window_of_losses_does_not_rise():
    rising, falling = list(range(14)), [-v for v in range(14)]
    dip = [0, 1, 2, 3, 4, 3, 2, 1, 0, 0, 0, 0, 0, 0]  # windows of 5: 1 2 3 4 3 rises, 2 3 4 3 2 is level, 3 .. 1 falls
    rate = steps_of(PlateauSteps(None, None, 0.9, 5, 2.0), [rising, falling, dip])
    first = 0.01  # a fifth of eps
    assert torch.allclose(rate[0], torch.full((14,), first, dtype=torch.float64))
    # A full window of five, then five new losses before the next cut.
    assert torch.allclose(rate[1], first / torch.tensor([1.0] * 4 + [2.0] * 5 + [4.0] * 5, dtype=torch.float64))
    # The newest of 3 4 3 2 1 (steps 3 to 7) is the first below its oldest; the next full window, 0 0 0 0 0, is level.
    assert torch.allclose(rate[2], first / torch.tensor([1.0] * 7 + [2.0] * 7, dtype=torch.float64))
    floor = steps_of(PlateauSteps("0.01", "0.004", 0.9, 5, 2.0), [falling])
    assert floor.min() == pytest.approx(0.004)


def test_adam_is_torchs_adam():
    gradients = torch.randn(7, 1, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, threat = torch.zeros(1, 1, 2, 2, dtype=torch.float64), Lp("linf", 0.3)
    parameter = nn.Parameter(x.clone())
    theirs, ours, state = torch.optim.Adam([parameter], lr=0.1, maximize=True), x.clone(), Adam(None).start(x, threat)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        theirs.step()
        state, step = Adam(None)(state, ours, torch.zeros(1), gradient, threat)
        ours = ours + step
        assert torch.allclose(ours, parameter.detach(), atol=1e-7)


def test_low_frequency_attacks_are_a_basis_and_stay_in_its_span():
    assert NES(basis=DCT(0.5)) == NES(**vars(LowFrequencyNES()))
    assert PGD(basis=DCT(0.5)) == PGD(**vars(LowFrequencyPGD()))
    model, _ = linear()
    images = grey(4)
    low = DCT(0.5)
    # One l2 step from the middle of the box: nothing is clipped, so the change is in the span.
    for attack in (LowFrequencyNES(), LowFrequencyPGD()):
        change = attack(model, images, torch.zeros(4, dtype=torch.int64), Lp("l2", 0.3), max_queries=400).x_adv - images
        assert torch.allclose(low.project(change), change, atol=1e-9)
        assert change.abs().max() > 0


@pytest.mark.parametrize("threat", [Lp("linf", 0.2), Lp("l2", 1.0), Lp("l1", 3.0)], ids=str)
def test_a_start_in_a_basis_lies_in_the_threat(threat):
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64).round()
    start = LowFrequencyPGD().ascent()._start(images, threat, Streams.from_generator(None, torch.arange(6)))
    assert threat.contains(start, images).all()
    assert (start != images).flatten(1).any(dim=1).all()


def test_a_smooth_direction_costs_fewer_queries_in_a_low_frequency_basis():
    """The cosine of an estimate is sqrt(p / (p + m + 1)): 16 coefficients instead of 64."""
    wave = DCT(0.25).decode(torch.tensor([0.0, 1.0, 1.0, 0.5], dtype=torch.float64), (1, 8, 8)).flatten()

    def model(x):
        score = (x.flatten(1) - 0.5) @ wave - 0.4
        return torch.stack([torch.zeros_like(score), score], dim=1)

    y, threat = torch.zeros(20, dtype=torch.int64), Lp("l2", 0.34)
    assert 0.4 / float(wave.norm()) < 0.34 * 0.9
    low, plain = (
        a(model, grey(), y, threat, max_queries=3000) for a in (NES(basis=DCT(0.25), samples=10), NES(samples=10))
    )
    assert low.success.all()
    assert low.first_success.median() < plain.forwards.median() / 1.5


@pytest.mark.parametrize("attack", [NES(), SPSA(), FiniteDifferences(), LowFrequencyNES()], ids=str)
def test_scores_are_enough(attack):
    assert attack.access == Access.SCORES
    assert not attack.supports(Lp("linf", None))
    assert attack.supports(Lp("linf", 0.1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NES(samples=3), "even number of probes"),
        (lambda: NES(sigma=-1), "sigma must be > 0"),
        (lambda: NES(lr=0), "lr must be > 0, got 0"),
        (lambda: NES(min_lr=-1), "min_lr must be > 0"),
        (lambda: NES(momentum=1), r"momentum must be in \[0, 1\)"),
        (lambda: NES(plateau_length=1), "plateau_length must be a whole number, at least 2"),
        (lambda: NES(plateau_drop=1), "plateau_drop must be > 1"),
        (lambda: NES(queries=0), "queries must be a whole number"),
        (lambda: NES(loss="cee"), "did you mean 'ce'"),
        (lambda: SPSA(delta=0), "delta must be > 0"),
        (lambda: SPSA(lr=-1), "lr must be > 0"),
        (lambda: FiniteDifferences(h=0), "h must be > 0"),
        (lambda: FiniteDifferences(steps=0), "steps must be a whole number"),
    ],
)
def test_settings_out_of_range_say_so(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.slow
def test_nes_on_mnist(shared_data):
    """The first 40 test images at linf 0.2, where PGD-40 fools every one."""
    import numpy as np

    from robustbench_lite.zoo import load_defense

    with np.load(shared_data / "mnist.npz") as data:
        x = torch.from_numpy(data["x_test"][:40] / 255).float().unsqueeze(1)
        y = torch.from_numpy(data["y_test"][:40]).long()
    result = NES()(load_defense("mnist/standard"), x, y, Lp("linf", 0.2), max_queries=1000)
    assert result.success.double().mean() > 0.75
    assert math.isfinite(result.first_success[result.success].double().median())
