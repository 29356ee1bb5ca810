"""Certified accuracy as a function of the radius, with what censoring and chance allow to say about it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.stats import CensoredData

from robustbench_lite.certify._binomial import clopper_pearson_lower, clopper_pearson_upper

__all__ = ["CertifiedAccuracy", "log_rank"]

Array = NDArray[np.float64]

NOT_CERTIFIED = -1.0  # the "radius" of a wrong or withheld answer: below every radius that is asked about


@dataclass(frozen=True, eq=False)
class CertifiedAccuracy:
    """The share of samples that are certified at each radius: a survival function.

    A sample "dies" at its certified radius. Where n votes agree, the radius is the largest that n draws can prove: the
    sample's own may be larger, it is right-censored there, and the curve ends (Kaplan and Meier 1958). Wrong and
    withheld answers are not certified at any radius.

    Attributes:
        radius: float64 (N,), 0 or more.
        correct: bool (N,): an answer was certified, and it is the true label.
        ceiling: the largest radius that can be proven (`largest_radius` of the certifier, with the number of classes
            where it asks for it), float or (N,); None: no limit, as for exact distances.

    Raises:
        ValueError: no samples, shapes that differ, radii that are negative or not finite, or above the ceiling.
    """

    radius: ArrayLike
    correct: ArrayLike
    ceiling: ArrayLike | None = None

    def __post_init__(self) -> None:
        radius, correct = np.asarray(self.radius, dtype=np.float64), np.asarray(self.correct, dtype=np.bool_)
        if radius.ndim != 1 or radius.shape != correct.shape or not len(radius):
            raise ValueError(f"expected radius and correct of one shape (N,), got {radius.shape} and {correct.shape}")
        if not (np.isfinite(radius) & (radius >= 0)).all():
            raise ValueError("radii must be finite and >= 0; a sample without certificate has correct = False")
        if self.ceiling is not None and (radius[correct] > np.broadcast_to(self.ceiling, radius.shape)[correct]).any():
            raise ValueError(f"a radius of {radius.max():g} lies above the ceiling {self.ceiling}")

    def times(self) -> CensoredData:
        """Return the radii as scipy's censored data; an answer that is not certified has a time below 0."""
        radius, correct = np.asarray(self.radius, dtype=np.float64), np.asarray(self.correct, dtype=np.bool_)
        ceiling = np.broadcast_to(np.inf if self.ceiling is None else self.ceiling, radius.shape)
        censored = correct & (radius >= ceiling * (1 - 1e-9))
        return CensoredData.right_censored(np.where(correct, radius, NOT_CERTIFIED), censored)

    def accuracy(self, radius: ArrayLike) -> Array:
        """Return the share of samples (...) certified at `radius` (...); NaN beyond the ceiling, as nobody can tell."""
        at = _just_below(radius)
        return np.where(self._beyond(at), np.nan, stats.ecdf(self.times()).sf.evaluate(at))

    def band(self, radius: ArrayLike, level: float = 0.95) -> tuple[Array, Array]:
        """Return pointwise confidence limits (lower, upper), each (...), of the accuracy among all samples.

        Greenwood's variance on the log-minus-log scale (`scipy.stats.ecdf`). Where all or none of the samples are
        certified that scale says nothing, and the exact binomial limits stand. Beyond the ceiling the lower limit is 0.

        Raises:
            ValueError: a level outside (0, 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie in (0, 1), got {level}")
        at = _just_below(radius)
        curve = stats.ecdf(self.times()).sf
        with warnings.catch_warnings():  # 0 / 0 at shares of 0 and 1, which are dealt with below
            warnings.simplefilter("ignore", RuntimeWarning)
            limits: Any = curve.confidence_interval(confidence_level=level, method="log-log")
            low, high = np.asarray(limits.low.evaluate(at)), np.asarray(limits.high.evaluate(at))
        share, n = np.asarray(curve.evaluate(at)), len(np.asarray(self.radius))
        edge = np.isnan(low) | np.isnan(high) | (share <= 0) | (share >= 1)
        counts = np.round(share * n)
        low = np.where(edge, clopper_pearson_lower(counts, n, (1 - level) / 2), low)
        high = np.where(edge, clopper_pearson_upper(counts, n, (1 - level) / 2), high)
        return np.where(self._beyond(at), 0.0, low), high

    def _beyond(self, at: Array) -> NDArray[np.bool_]:
        return np.asarray(at >= (np.inf if self.ceiling is None else np.max(np.asarray(self.ceiling))))


def _just_below(radius: ArrayLike) -> Array:
    """Return what a survival function, P(more than r), is asked for P(at least r)."""
    return np.asarray(np.nextafter(np.asarray(radius, dtype=np.float64), -1))


def log_rank(one: CertifiedAccuracy, other: CertifiedAccuracy) -> float:
    """Return the two-sided p-value of "both curves are the same", by the log-rank test (`scipy.stats.logrank`).

    The samples of the two curves have to be independent. For two certifiers on the same images the test is conservative
    where their radii rise and fall together. Curves that cross can differ without its notice.
    """
    return float(stats.logrank(one.times(), other.times()).pvalue)
