"""Exact intervals for accuracies.

Clopper and Pearson 1934: the interval of all rates p under which as many successes as seen, or as few, have probability
at least (1 - level) / 2. Both tails of the binomial are values of the incomplete beta function, so its inverse gives
the ends.
"""

from __future__ import annotations

import math

from scipy.special import betaincinv

__all__ = ["clopper_pearson"]


def clopper_pearson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return the exact confidence interval (low, high) of a rate of which `successes` of `n` trials were seen.

    n = 0 says nothing: (0, 1).

    Raises:
        ValueError: not 0 <= successes <= n, or a level outside (0, 1).

    Example:
        >>> low, high = clopper_pearson(0, 10)
        >>> low, round(high, 4)
        (0.0, 0.3085)
    """
    if not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n, got {successes} of {n}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(betaincinv(successes, n - successes + 1, tail))
    high = 1.0 if successes == n else float(betaincinv(successes + 1, n - successes, 1 - tail))
    if math.isnan(low) or math.isnan(high):
        raise ArithmeticError(f"no interval for {successes} of {n} at level {level}")
    return low, high
