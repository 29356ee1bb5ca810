"""The bounds on a vote's probability, against exact distributions."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.special import betaln

from robustbench_lite.certify import EarlyStopping, FixedSampleSize
from robustbench_lite.certify._binomial import (
    clopper_pearson_lower,
    clopper_pearson_upper,
    mixture_lower,
    mixture_upper,
)


@pytest.mark.parametrize("n", [1, 7, 200])
@pytest.mark.parametrize("alpha", [0.001, 0.3])
def test_clopper_pearson_is_scipys(n, alpha):
    k = np.arange(n + 1)
    low, high = clopper_pearson_lower(k, n, alpha), clopper_pearson_upper(k, n, alpha)
    for successes in k:
        one_sided = [
            stats.binomtest(int(successes), n, alternative=side).proportion_ci(1 - alpha)
            for side in ("greater", "less")
        ]
        assert low[successes] == pytest.approx(one_sided[0].low, abs=1e-12)
        assert high[successes] == pytest.approx(one_sided[1].high, abs=1e-12)


@pytest.mark.parametrize("p", [0.3, 0.84, 0.99])
def test_the_wealth_of_the_bet_has_mean_one(p):
    """At the true p, exactly, whatever n: with Ville's inequality this is the proof of the confidence sequence."""
    for n in (1, 10, 300):
        k = np.arange(n + 1)
        wealth = betaln(k + 0.5, n - k + 0.5) - np.log(np.pi) - k * np.log(p) - (n - k) * np.log1p(-p)
        assert np.exp(stats.binom(n, p).logpmf(k) + wealth).sum() == pytest.approx(1, rel=1e-9)
        low = mixture_lower(k, n, 0.05)[1:-1]
        inner = k[1:-1]
        at_the_end = betaln(inner + 0.5, n - inner + 0.5) - np.log(np.pi) - inner * np.log(low)
        np.testing.assert_allclose(at_the_end - (n - inner) * np.log1p(-low), np.log(20), rtol=1e-9)


@pytest.mark.parametrize("p", [0.5, 0.8413, 0.98])
@pytest.mark.parametrize("alpha", [0.01, 0.2])
def test_looking_after_every_draw_errs_with_probability_alpha_at_most(p, alpha):
    """The exact probability that either end of the confidence sequence ever passes p, over 500 looks."""
    alive, err = np.array([1.0]), 0.0
    for n in range(1, 501):
        alive = np.append(alive * (1 - p), 0) + np.append(0, alive * p)
        k = np.arange(n + 1)
        gone = (mixture_lower(k, n, alpha) > p) | (mixture_upper(k, n, alpha) < p)
        err += alive[gone].sum()
        alive[gone] = 0
    assert err <= alpha
    assert err > alpha / 20  # and not by saying nothing


def test_looking_again_and_again_with_a_fixed_sample_bound_errs_more_often():
    """Why early stopping needs bounds of its own."""
    p, alpha, alive, err = 0.84, 0.05, np.array([1.0]), 0.0
    for n in range(1, 501):
        alive = np.append(alive * (1 - p), 0) + np.append(0, alive * p)
        gone = clopper_pearson_lower(np.arange(n + 1), n, alpha) > p
        err += alive[gone].sum()
        alive[gone] = 0
    assert err > 2 * alpha


@pytest.mark.parametrize("threshold", [0.72, 0.78, 0.82, 0.8413])
@pytest.mark.parametrize("alpha", [0.1, 0.2])
def test_a_bound_read_off_where_the_plan_stops_errs_with_probability_alpha_at_most(threshold, alpha):
    """Exactly, by the law of the votes over all looks; the bound of a fixed sample would err up to 0.32 of the time."""
    plan, p, n, before, alive, err = EarlyStopping(), 0.8413, 3000, 0, np.array([1.0]), 0.0
    for look in plan.looks(n, 128):
        alive = np.convolve(alive, stats.binom(look - before, p).pmf(np.arange(look - before + 1)))
        k, before = np.arange(look + 1), look
        stop = ~plan.undecided(k, look, alpha, np.full(look + 1, threshold)) | (look == n)
        err += alive[stop & (plan.lower(k, look, alpha) > p)].sum()
        alive[stop] = 0
    assert alive.sum() == 0
    assert err <= alpha


@pytest.mark.parametrize("n", [1, 20, 60])
@pytest.mark.parametrize("level", [0.001, 0.2])
def test_the_upper_bound_of_a_rival_is_at_most_one_less_the_lower_bound_of_the_first(n, level):
    """Two-sided certificates suppose p1 + p2 <= 1; as the votes of both are at most n, they need not cut p2."""
    first, second = np.meshgrid(np.arange(n + 1), np.arange(n + 1))
    fits = first + second <= n
    low, high = clopper_pearson_lower(first, n, level), clopper_pearson_upper(second, n, level)
    assert (high <= 1 - low)[fits].all()


@pytest.mark.parametrize("n", [1, 128, 129, 1000, 100_000])
def test_looks_come_in_blocks_and_end_at_n(n):
    looks = list(EarlyStopping().looks(n, 128))
    assert looks[-1] == n
    assert all(look % 128 == 0 for look in looks[:-1])
    assert (np.diff(looks) > 0).all()
    assert len(looks) <= 80
    assert list(FixedSampleSize().looks(n, 128)) == [n]


def test_a_question_is_open_while_the_sequence_holds_its_threshold():
    plan, n, alpha = EarlyStopping(), 1000, 0.01
    k = np.arange(n + 1)
    still = plan.undecided(k, n, alpha, np.full(n + 1, 0.8))
    inside = (mixture_lower(k, n, alpha) < 0.8) & (mixture_upper(k, n, alpha) > 0.8)
    assert (still == inside).all()
    assert still[800]
    assert not still[700]
    assert not still[900]
