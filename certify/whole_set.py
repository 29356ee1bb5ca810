"""Corrections for many certificates: with one probability alpha, all of a set are right."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["bonferroni", "holm"]


def bonferroni(alpha: float, samples: int) -> float:
    """Return the level for each certificate so that all of `samples` are right with probability 1 - alpha.

    A certifier's `alpha` is for one sample: among 1,000 certificates of alpha = 0.001 one is expected to be wrong.
    `RandomizedSmoothing(sigma, alpha=bonferroni(0.001, len(data)))` holds for the whole set, radii included.

    Raises:
        ValueError: alpha outside (0, 1), or fewer than one sample.

    >>> bonferroni(0.001, 500)
    2e-06
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha}")
    if samples < 1:
        raise ValueError(f"expected at least 1 sample, got {samples}")
    return alpha / samples


def holm(p_values: ArrayLike, alpha: float) -> NDArray[np.bool_]:
    """Say which samples (B,) are certified, all of them right with probability 1 - alpha, whatever their dependence.

    The smallest p-value is held against alpha / B, the next against alpha / (B - 1), and so on until one fails: never
    fewer samples than by `bonferroni`. `MajorityCertifier.p_values` gives the p-values of a threat. It concerns the
    class that the votes chose; whether that is the true label is known.

    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics, 1979.

    Raises:
        ValueError: alpha outside (0, 1), or p-values outside [0, 1] or of another shape than (B,).

    >>> holm([0.04, 0.001, 0.02], 0.05).tolist()
    [True, True, True]
    >>> holm([0.06, 0.001, 0.03], 0.05).tolist()
    [False, True, False]
    """
    p = np.asarray(p_values, dtype=np.float64)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha}")
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"expected p-values (B,) in [0, 1], got shape {p.shape} with values {p}")
    order = np.argsort(p, kind="stable")
    passed = p[order] <= alpha / np.arange(len(p), 0, -1)
    certified = np.zeros(len(p), dtype=np.bool_)
    certified[order] = np.logical_and.accumulate(passed)
    return certified
