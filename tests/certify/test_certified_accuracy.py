"""Certified-accuracy curves, their comparison, and corrections for a whole set of certificates."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from robustbench_lite.certify import (
    CertifiedAccuracy,
    RandomizedSmoothing,
    UniformSmoothing,
    Votes,
    bonferroni,
    holm,
    log_rank,
)
from robustbench_lite.core.threats import Lp


def sample(n: int, seed: int, scale: float = 1.0, ceiling: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return np.minimum(rng.exponential(scale, n), ceiling), rng.random(n) < 0.9


def test_up_to_the_ceiling_the_curve_is_the_share_of_certified_samples():
    radius, correct = sample(400, 0)
    radius = np.round(radius, 2)  # with ties
    curve = CertifiedAccuracy(radius, correct, 1.5)
    at = np.array([0.0, 0.01, 0.5, 1.0, 1.49, 1.5])
    np.testing.assert_allclose(curve.accuracy(at), ((radius >= at[:, None]) & correct).mean(1), atol=1e-12)
    assert np.isnan(curve.accuracy(1.51))
    low, high = curve.band([1.5, 1.51])
    assert low[0] > 0 == low[1]
    assert high[0] == high[1] > curve.accuracy(1.5)


def test_with_several_ceilings_the_curve_is_the_product_of_kaplan_and_meier():
    """Samples that were measured with few draws leave the count where they are censored."""
    rng = np.random.default_rng(1)
    own, ceiling = rng.exponential(1, 200), rng.choice([0.5, 1.0, 2.0], 200)
    curve = CertifiedAccuracy(np.minimum(own, ceiling), np.ones(200, dtype=bool), ceiling)
    for at in (0.3, 0.7, 1.2, 1.9):
        product = 1.0
        for death in np.sort(own[own < ceiling]):
            if death < at:
                product *= 1 - 1 / (np.minimum(own, ceiling) >= death).sum()
        assert curve.accuracy(at) == pytest.approx(product, abs=1e-12)
        at_risk = [(np.minimum(own, ceiling) >= d).sum() for d in own[own < ceiling] if d < at]
        spread = sum(1 / (r * (r - 1)) for r in at_risk) ** 0.5 / np.log(product)  # Greenwood's, of log(-log)
        low, high = curve.band(at)
        assert low == pytest.approx(product ** np.exp(-1.959964 * spread), abs=1e-6)
        assert high == pytest.approx(product ** np.exp(1.959964 * spread), abs=1e-6)
    assert abs(float(curve.accuracy(1.9)) - np.exp(-1.9)) < 0.1


def test_the_band_covers_the_truth_as_often_as_it_says():
    at, truth = np.array([0.05, 0.5, 1.2]), 0.9 * np.exp(-np.array([0.05, 0.5, 1.2]))
    held = np.zeros(3)
    for seed in range(300):
        low, high = CertifiedAccuracy(*sample(80, seed), 1.5).band(at, 0.9)
        held += (low <= truth) & (truth <= high)
    assert (held / 300 > 0.84).all()
    assert (held / 300 < 0.97).all()


def test_the_band_at_shares_of_zero_and_one_is_the_exact_binomial_one():
    curve = CertifiedAccuracy(np.full(20, 0.5), np.ones(20, dtype=bool))
    (low, nothing), (everything, high) = curve.band([0.5, 0.6], 0.9)
    assert (nothing, everything) == (0, 1)
    assert low == pytest.approx(stats.binomtest(20, 20).proportion_ci(0.9).low)
    assert high == pytest.approx(stats.binomtest(0, 20).proportion_ci(0.9).high)


def test_log_rank_is_observed_less_expected():
    one, other = CertifiedAccuracy(*sample(60, 0), 1.5), CertifiedAccuracy(*sample(80, 1, 0.3), 1.5)
    times, died, first = [], [], []
    for curve, label in ((one, True), (other, False)):
        radius, correct = np.asarray(curve.radius), np.asarray(curve.correct)
        times += list(np.where(correct, radius, -1))
        died += list(~correct | (radius < 1.5))
        first += [label] * len(radius)
    t, d, g = np.array(times), np.array(died), np.array(first)
    difference = variance = 0.0
    for time in np.unique(t[d]):
        risk, mine, deaths = (t >= time).sum(), ((t >= time) & g).sum(), ((t == time) & d).sum()
        difference += ((t == time) & d & g).sum() - deaths * mine / risk
        variance += deaths * mine / risk * (1 - mine / risk) * (risk - deaths) / max(risk - 1, 1)
    assert log_rank(one, other) == pytest.approx(2 * stats.norm.sf(abs(difference) / variance**0.5), rel=1e-9)
    assert log_rank(one, other) < 0.05 < log_rank(one, one)


@pytest.mark.parametrize(
    ("radius", "correct", "ceiling", "message"),
    [
        ([], [], None, "one shape"),
        ([1.0], [True, True], None, "one shape"),
        ([-0.1], [True], None, "finite and >= 0"),
        ([np.nan], [True], None, "finite and >= 0"),
        ([2.0], [True], 1.0, "above the ceiling"),
    ],
)
def test_curves_of_nonsense(radius, correct, ceiling, message):
    with pytest.raises(ValueError, match=message):
        CertifiedAccuracy(radius, correct, ceiling)
    with pytest.raises(ValueError, match="level must lie"):
        CertifiedAccuracy([1.0], [True]).band(0.5, 1.0)


@given(st.lists(st.floats(0, 0.2), min_size=1, max_size=5), st.sampled_from([0.05, 0.1]))
def test_holm_is_the_closure_of_bonferroni(p_values, alpha):
    """A sample is certified if every set of samples that holds it has a p-value below alpha over the set's size."""
    expected = [
        all(
            min(p_values[j] for j in group) <= alpha / len(group)
            for size in range(1, len(p_values) + 1)
            for group in itertools.combinations(range(len(p_values)), size)
            if i in group
        )
        for i in range(len(p_values))
    ]
    assert holm(p_values, alpha).tolist() == expected


def test_p_values_of_votes_certify_by_bonferroni_what_the_radii_do():
    counts = torch.tensor([[0, n] for n in range(800, 1001, 5)])
    draws = torch.full((len(counts),), 1000)
    alpha = bonferroni(0.05, len(counts))
    method = RandomizedSmoothing(0.5, n=1000, alpha=alpha)
    votes = Votes(counts, counts, 100, draws, torch.Size([1, 2, 2]), method.source)
    threat = Lp("l2", 0.6)
    certified = method.certify_votes(votes, torch.ones_like(draws), threat).certified.numpy()
    p_values = method.p_values(votes, threat)
    assert certified.any()
    assert not certified.all()
    assert ((p_values <= alpha) == certified).all()
    assert p_values[0] == pytest.approx(stats.binomtest(800, 1000, stats.norm.cdf(1.2), "greater").pvalue)
    assert (certified <= holm(p_values, 0.05)).all()


def test_p_values_of_votes_that_prove_nothing_are_refused():
    counts, draws = torch.tensor([[0, 1000], [0, 1000]]), torch.tensor([1000, 1000])
    method, shape = RandomizedSmoothing(0.5, n=1000), torch.Size([1, 2, 2])
    votes = Votes(counts, counts, 100, draws, shape, method.source)
    with pytest.raises(ValueError, match="got votes under"):  # they would prove ten times the radius
        RandomizedSmoothing(5.0, n=1000).p_values(votes, Lp("l2", 1.0))
    early = Votes(counts, counts, 100, torch.tensor([1000, 512]), shape, method.source)
    with pytest.raises(ValueError, match="n = 1000 draws of each sample, got 512 to 1000"):
        method.p_values(early, Lp("l2", 0.1))
    eps = 0.1234567890123456  # no float32
    expected = stats.binom.sf(999, 1000, stats.norm.cdf(eps / 0.5))
    np.testing.assert_allclose(method.p_values(votes, Lp("l2", eps)), expected, rtol=1e-5)
    close = method.p_values(votes, Lp("l2", torch.tensor([eps, eps * (1 + 1e-8)], dtype=torch.float64)))
    assert close[0] == method.p_values(votes, Lp("l2", eps))[0] < close[1]
    uniform = UniformSmoothing(0.5, n=1000)
    beyond = uniform.p_values(Votes(counts, counts, 100, draws, shape, uniform.source), Lp("l1", 0.75))
    assert beyond.tolist() == [1, 1]  # no votes prove more than half_width


def test_corrections_of_nonsense():
    for call in (lambda: bonferroni(0, 5), lambda: bonferroni(1, 5), lambda: holm([0.1], 1.0)):
        with pytest.raises(ValueError, match="alpha must lie"):
            call()
    with pytest.raises(ValueError, match="at least 1 sample"):
        bonferroni(0.1, 0)
    with pytest.raises(ValueError, match="expected p-values"):
        holm([1.5], 0.1)
