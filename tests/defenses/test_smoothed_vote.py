from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import binom, binomtest, norm

from robustbench_lite.certify import EarlyStopping, GaussianNoise, RandomizedSmoothing
from robustbench_lite.certify.votes import Votes
from robustbench_lite.core.threats import Lp
from robustbench_lite.defenses import ClearWinner, SmoothedVote

SHAPE = torch.Size((1, 2, 2))


@pytest.mark.parametrize(("draws", "alpha", "looks"), [(60, 0.1, 2), (40, 0.01, 1)])
def test_a_winner_is_clear_where_a_two_sided_test_at_a_looks_level_says_so(
    draws: int, alpha: float, looks: int
) -> None:
    rule = ClearWinner(draws, alpha)
    fewest = rule.fewest.tolist()
    assert len(rule.looks) == looks
    for both in range(1, draws + 1):
        for first in range((both + 1) // 2, both + 1):
            assert (first >= fewest[both]) == (binomtest(first, both, 0.5).pvalue <= alpha / looks), (first, both)


def test_there_is_a_first_look_only_where_it_can_be_clear() -> None:
    for draws in (11, 14, 50, 100, 119, 120, 200, 1000):
        rule = ClearWinner(draws, 0.001)
        expected = [draws // 10] if 2 * 0.5 ** (draws // 10) <= 0.0005 else []
        assert rule.looks == (*expected, draws)
        assert all(rule.fewest[look] <= look for look in rule.looks)
    assert ClearWinner(100, 0.001).needed == pytest.approx(binom_needed(100, 0.001))


def binom_needed(draws: int, alpha: float) -> float:
    """With one look: where a binomial test at the whole level is passed with probability 1 - alpha, by search."""
    enough = next(k for k in range(draws // 2, draws + 1) if binomtest(k, draws, 0.5).pvalue <= alpha)
    return float(brentq(lambda p: binom.sf(enough - 1, draws, p) - (1 - alpha), 0.5, 1 - 1e-9, xtol=1e-12))


@pytest.mark.parametrize(("draws", "alpha"), [(120, 0.001), (1000, 0.001), (500, 0.1)])
def test_from_the_needed_probability_on_one_call_answers_the_class(draws: int, alpha: float) -> None:
    rule = ClearWinner(draws, alpha)
    assert binom.sf(rule.fewest[-1] - 1, draws, rule.needed) == pytest.approx(1 - alpha / 2)
    rng, trials = np.random.default_rng(0), 200_000
    first = rng.binomial(rule.looks[0], rule.needed, trials)
    last = first + rng.binomial(draws - rule.looks[0], rule.needed, trials)
    fewest = rule.fewest.numpy()
    early_wrong = rule.looks[0] - first >= fewest[rule.looks[0]]  # all rivals are one class: the worst case
    early_right = first >= fewest[rule.looks[0]]
    missed = early_wrong | ~early_right & (last < fewest[draws])
    assert missed.mean() <= alpha + 4 * np.sqrt(alpha / trials)
    assert missed.mean() >= alpha / 100


def votes(successes: list[int], n: int, sigma: float) -> Votes:
    counts = torch.tensor([[k, n - k] for k in successes])
    drawn = torch.full((len(successes),), n)
    return Votes(counts, counts, 10, drawn, SHAPE, (GaussianNoise(sigma),))


def test_the_radius_is_cohens_less_what_the_vote_needs() -> None:
    sigma, n = 0.5, 10_000
    mine, cohen = SmoothedVote(sigma, 1000, n0=10, n=n), RandomizedSmoothing(sigma, n0=10, n=n)
    taken, y = votes([9000, 9900, 10_000], n, sigma), torch.zeros(3, dtype=torch.int64)
    for size, factor in (("l2", 1.0), ("l1", 1.0), ("linf", 0.5)):
        threat = Lp(size, 0.01)
        less = factor * sigma * norm.ppf(ClearWinner(1000, 0.001).needed)
        found = mine.certify_votes(taken, y, threat).radius
        assert found.tolist() == pytest.approx((cohen.certify_votes(taken, y, threat).radius - less).tolist())


def test_needed_is_the_inverse_of_the_radii() -> None:
    mine, eps = SmoothedVote(0.5, 1000), np.array([0.0, 0.2, 0.7])
    for size in ("l2", "l1", "linf"):
        p = mine.needed(eps, size, SHAPE)
        assert mine.radii(p + 1e-8, size, SHAPE) == pytest.approx(eps, abs=1e-6)


def test_what_the_vote_cannot_be_sure_of_is_abstained_on_though_cohen_certifies_it() -> None:
    n, y = 10_000, torch.zeros(1, dtype=torch.int64)
    taken = votes([5600], n, 0.5)  # p is about 0.56, and a vote of 1,000 needs 0.61
    assert RandomizedSmoothing(0.5, n0=10, n=n).certify_votes(taken, y, Lp("l2", 0.01)).certified.all()
    found = SmoothedVote(0.5, 1000, n0=10, n=n).certify_votes(taken, y, Lp("l2", 0.0))
    assert found.prediction.tolist() == [-1]
    assert found.radius.tolist() == [0.0]


def test_more_draws_lose_less() -> None:
    needed = [ClearWinner(draws, 0.001).needed for draws in (100, 1000, 10_000, 100_000)]
    assert needed == sorted(needed, reverse=True)
    assert needed[-1] > 0.5


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("raise draws", lambda: ClearWinner(8, 0.001)),
        ("draws must be a whole number", lambda: ClearWinner(100.0, 0.001)),
        ("alpha must lie in", lambda: ClearWinner(1000, 0.0)),
        ("alpha must lie in", lambda: ClearWinner(1000, 1.0)),
        ("alpha must lie in", lambda: ClearWinner(1000, float("nan"))),
        ("alpha must lie in", lambda: ClearWinner(1000, "0.1")),
        ("raise draws", lambda: SmoothedVote(0.5, 8)),
        ("takes all n draws", lambda: SmoothedVote(0.5, 1000, stopping=EarlyStopping())),
        ("sigma", lambda: SmoothedVote(-0.5, 1000)),
        ("alpha", lambda: SmoothedVote(0.5, 1000, alpha=2.0)),
    ],
)
def test_bad_arguments_are_refused(message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        make()
