"""How many draws a vote takes, and what the counts prove: a fixed number, or until the question is settled."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from robustbench_lite.certify._binomial import clopper_pearson_lower, mixture_lower, mixture_upper

__all__ = ["EarlyStopping", "FixedSampleSize", "Stopping"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Stopping(ABC):
    """A plan of looks at the votes. All looks together err with probability at most alpha."""

    @abstractmethod
    def looks(self, n: int, block: int) -> Iterator[int]:
        """Yield the numbers of draws after which the votes are counted: multiples of `block`, and `n` last."""

    @abstractmethod
    def lower(self, successes: Array, draws: Array | int, alpha: float) -> Array:
        """Return lower bounds (...) on the probability, from `successes` (...) of `draws` draws at the last look."""

    @abstractmethod
    def undecided(self, successes: Array, draws: int, alpha: float, probability: Array) -> NDArray[np.bool_]:
        """Say where it is worth while to draw on to know if the true probability exceeds `probability` (...)."""


@dataclass(frozen=True)
class FixedSampleSize(Stopping):
    """One look, after all n draws, by the one-sided Clopper-Pearson bound: CERTIFY of Cohen et al."""

    def looks(self, n: int, block: int) -> Iterator[int]:
        """Yield n."""
        yield n

    def lower(self, successes: Array, draws: Array | int, alpha: float) -> Array:
        """Return the Clopper-Pearson bounds."""
        return clopper_pearson_lower(successes, draws, alpha)

    def undecided(self, successes: Array, draws: int, alpha: float, probability: Array) -> NDArray[np.bool_]:
        """Say no: there is no second look."""
        return np.zeros(np.shape(successes), dtype=np.bool_)


@dataclass(frozen=True)
class EarlyStopping(Stopping):
    """Stop as soon as "the probability exceeds what the threat's eps needs" is proven or refuted, or after n draws.

    The bounds are a confidence sequence by betting (`mixture_lower` in `_binomial.py` has the proof): with probability
    1 - alpha they hold at all looks together, so neither the number of looks nor the reason to stop matters, and the
    error budget alpha is never exceeded. Looks at growing distances save host syncs, at no price in alpha.

    A sample whose class holds p needs about log(1 / alpha) / KL(p, p0) draws and a few hundred more, p0 being the
    probability that eps needs. Near p0 it takes all n; there `FixedSampleSize` proves slightly more.

    Source: Darling and Robbins 1967; Voracek 2024, arXiv:2406.17830.

    Attributes:
        growth: each look comes after at least this many times the draws of the one before.

    Raises:
        ValueError: a growth below 1.
    """

    growth: float = 1.1

    def __post_init__(self) -> None:
        if not 1 <= self.growth < math.inf:
            raise ValueError(f"growth must be >= 1 and finite, got {self.growth}")

    def looks(self, n: int, block: int) -> Iterator[int]:
        """Yield multiples of `block` at growing distances, and n."""
        draws = block
        while draws < n:
            yield draws
            draws = max(draws + block, math.ceil(draws * self.growth / block) * block)
        yield n

    def lower(self, successes: Array, draws: Array | int, alpha: float) -> Array:
        """Return the lower ends of the confidence sequence."""
        return mixture_lower(successes, draws, alpha)

    def undecided(self, successes: Array, draws: int, alpha: float, probability: Array) -> NDArray[np.bool_]:
        """Say where the confidence sequence still holds `probability`."""
        low, high = (bound(successes, draws, alpha) for bound in (mixture_lower, mixture_upper))
        return np.asarray((low < probability) & (probability <= high))
