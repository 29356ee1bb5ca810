"""Exact bounds on the probability of an event of which k of n draws were seen, for arrays of counts."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc, betaincinv, betaln, xlog1py, xlogy

__all__: list[str] = []

Array = NDArray[np.float64]

HALVINGS = 60  # of a bisection in [0, 1]: down to the rounding of a float64


def clopper_pearson_lower(successes: Array, draws: Array | int, alpha: float) -> Array:
    """Return p (...) with P(p > true probability) <= alpha, from one look at `successes` (...) of `draws`.

    Clopper and Pearson 1934, one-sided: the smallest p at which as many successes have probability `alpha`.
    """
    k = np.asarray(successes, dtype=np.float64)
    return np.where(k > 0, betaincinv(np.maximum(k, 1), draws - k + 1, alpha), 0.0)


def clopper_pearson_upper(successes: Array, draws: Array | int, alpha: float) -> Array:
    """Return p (...) with P(p < true probability) <= alpha, from one look at `successes` (...) of `draws`."""
    return 1 - clopper_pearson_lower(draws - np.asarray(successes, dtype=np.float64), draws, alpha)


def upper_tail(successes: Array, draws: Array | int, probability: Array | float) -> Array:
    """Return P(Binomial(draws, probability) >= successes), the p-value of "at most this probability"."""
    k = np.asarray(successes, dtype=np.float64)
    return np.where(k > 0, betainc(np.maximum(k, 1), draws - k + 1, probability), 1.0)


def mixture_lower(successes: Array, draws: Array | int, alpha: float) -> Array:
    """Return the lower end (...) of a confidence sequence: it may be looked at after every draw.

    With probability at least 1 - alpha the true p lies above the lower ends, and below the upper ends, of all looks
    together. Proof. Bet against the hypothesis p by the mixture of likelihood ratios

        W_n(p) = int q^k (1 - q)^(n - k) dBeta(q; 1/2, 1/2) / (p^k (1 - p)^(n - k)).

    Under p each likelihood ratio is a martingale with mean 1 (a draw multiplies it by q / p with probability p and by
    (1 - q) / (1 - p) with probability 1 - p), so W is one as well, and by Ville's inequality W_n(p) >= 1 / alpha at any
    n with probability at most alpha. As log W_n(p) is convex in p with its minimum at k / n, the p that are not refuted
    are an interval around k / n; its ends are found by bisection, from the side of what is refuted. (Darling and
    Robbins 1967; Robbins 1970. For smoothing: Voracek 2024, arXiv:2406.17830.)
    """
    k = np.asarray(successes, dtype=np.float64)
    mixture = betaln(k + 0.5, draws - k + 0.5) - math.log(math.pi) + math.log(alpha)
    refuted, rest = np.zeros_like(k), k / draws
    for _ in range(HALVINGS):
        middle = (refuted + rest) / 2
        holds = mixture >= xlogy(k, middle) + xlog1py(draws - k, -middle)
        refuted, rest = np.where(holds, middle, refuted), np.where(holds, rest, middle)
    return np.where(k > 0, refuted, 0.0)


def mixture_upper(successes: Array, draws: Array | int, alpha: float) -> Array:
    """Return the upper end (...) of the confidence sequence of `mixture_lower`."""
    return 1 - mixture_lower(draws - np.asarray(successes, dtype=np.float64), draws, alpha)
