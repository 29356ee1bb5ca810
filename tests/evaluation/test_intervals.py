"""Exact intervals against the equations that define them, with the binomial tails summed in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import pytest

from robustbench_lite.evaluation.intervals import clopper_pearson


def tail(n: int, p: float, counts: range) -> float:
    """P(X in counts) for X ~ Binomial(n, p), without rounding."""
    q = Fraction(p)
    return float(sum(comb(n, i) * q**i * (1 - q) ** (n - i) for i in counts))


@pytest.mark.parametrize("n", [1, 2, 7, 60])
@pytest.mark.parametrize("level", [0.95, 0.5])
def test_ends_solve_the_defining_equations(n: int, level: float) -> None:
    for k in range(n + 1):
        low, high = clopper_pearson(k, n, level)
        assert low <= k / n <= high
        if k > 0:
            assert tail(n, low, range(k, n + 1)) == pytest.approx((1 - level) / 2, rel=1e-9)
        if k < n:
            assert tail(n, high, range(k + 1)) == pytest.approx((1 - level) / 2, rel=1e-9)


def test_edges() -> None:
    assert clopper_pearson(0, 0) == (0.0, 1.0)
    assert clopper_pearson(0, 9)[0] == 0.0
    assert clopper_pearson(9, 9)[1] == 1.0
    assert clopper_pearson(9, 9)[0] == pytest.approx(0.025 ** (1 / 9))  # closed form
    low, high = clopper_pearson(9_500, 10_000)
    assert 0.945 < low < 0.95 < high < 0.955


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3)])
def test_impossible_counts(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="0 <= successes <= n"):
        clopper_pearson(k, n)


def test_impossible_level() -> None:
    with pytest.raises(ValueError, match="level"):
        clopper_pearson(1, 2, 1.0)
