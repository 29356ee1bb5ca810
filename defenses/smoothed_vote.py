"""The vote of a smoothed classifier: when its winner is clear, and in which ball around an image it will be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import betaincinv, ndtr, ndtri
from scipy.stats import binom
from torch import Tensor

from robustbench_lite.certify._inclusion import inclusion
from robustbench_lite.certify._vote_checks import check_count
from robustbench_lite.certify.randomized_smoothing import RandomizedSmoothing
from robustbench_lite.certify.stopping import FixedSampleSize
from robustbench_lite.core.models import Model
from robustbench_lite.core.results import Certificate
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["ClearWinner", "SmoothedVote"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ClearWinner:
    """PREDICT of Cohen et al. in two looks: after a tenth of the draws, and after all.

    At each of L looks a two-sided binomial test at level alpha / L asks whether the class with most votes and the
    second could be equally likely. If not, the first is the answer; if so after all draws, there is none. So an answer
    other than the most likely class has probability at most alpha, as in the original with its one look. Most inputs
    are clear at a tenth of its price. Where a tenth of the draws could not be clear if all agreed, L is 1.

    A class with probability p > 1/2 is missed only if all its rivals together are clear at the first of two looks,
    which has probability at most alpha / 4, or if it is not clear at the last. `needed` is the p from which the latter
    has probability at most alpha / L: from there on one call answers the class with probability 1 - alpha.

    Attributes:
        draws: votes at most.
        alpha: probability of a wrong answer at most, in (0, 1).

    Raises:
        ValueError: draws that are no whole number, an alpha outside (0, 1), or no vote of so few draws can ever be
            clear.
    """

    draws: int
    alpha: float

    def __post_init__(self) -> None:
        check_count("draws", self.draws, "votes")
        if not (isinstance(self.alpha, float) and 0 < self.alpha < 1):
            raise ValueError(f"alpha must lie in (0, 1), got {self.alpha!r}: it is the probability of a wrong answer")
        if fewest(self.draws, self.level) > self.draws:
            raise ValueError(
                f"{self.draws} draws at alpha = {self.alpha:g} cannot tell any class from a tie, even if all agree: "
                "raise draws"
            )

    @property
    def looks(self) -> tuple[int, ...]:
        """Numbers of draws after which the votes are counted."""
        first = self.draws // 10
        return (first, self.draws) if fewest(first, self.alpha / 2) <= first else (self.draws,)

    @property
    def level(self) -> float:
        """Of the test at each look."""
        return self.alpha / len(self.looks)

    @cached_property
    def fewest(self) -> Tensor:
        """int64 (draws + 1,): by the votes of the first two classes together, how many the first has to have."""
        return torch.from_numpy(fewest(np.arange(self.draws + 1), self.level))

    @cached_property
    def needed(self) -> float:
        """The probability of a class from which on one call answers it with probability at least 1 - alpha."""
        enough = float(fewest(self.draws, self.level))
        return float(betaincinv(enough, self.draws - enough + 1, 1 - self.level))


def fewest(votes: int | NDArray[np.int64], level: float) -> NDArray[np.int64]:
    """Return how many of `votes` for two classes the first has to have, that a two-sided test tells it from a tie."""
    return 1 + np.asarray(binom.isf(level / 2, votes, 0.5), dtype=np.int64)


@dataclass(frozen=True)
class SmoothedVote(RandomizedSmoothing):
    """CERTIFY for answers that come from a finite vote: the ball in which one call of PREDICT gives the class.

    `RandomizedSmoothing` proves where the class is the most likely one, sigma Phi^-1(pA). At the edge of that ball it
    is only just so, no finite vote can tell, and `ClearWinner` abstains, which an evaluation counts as an error. The
    class's probability is at least p* = `ClearWinner.needed`, and with it one call answers right with probability
    1 - alpha, in the ball of radius

        sigma (Phi^-1(pA) - Phi^-1(p*)),

    which this certifies: 0.27 sigma less for 1,000 draws, 0.08 sigma less for 10,000 (alpha 0.001). The proof is that
    of Cohen et al. with p* in place of 1/2.

    Departures from `RandomizedSmoothing`: an eps that n votes cannot prove is not certified, and no error, for a
    defense may be asked about any threat; and all n are drawn, so that the radius is all that they prove.

    Attributes:
        draws: votes of PREDICT.

    Raises:
        ValueError: early stopping, draws that can never be clear, or as in `RandomizedSmoothing`.
    """

    draws: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.stopping, FixedSampleSize):
            raise ValueError(
                f"{type(self).__name__} takes all n draws, got stopping={self.stopping}: leave it out, or lower n"
            )
        self.vote  # noqa: B018  (it checks its settings)

    @property
    def vote(self) -> ClearWinner:
        """The rule of the vote."""
        return ClearWinner(self.draws, self.alpha)

    def radii(self, p: Array, norm: str, shape: torch.Size) -> Array:
        """Return the radii; NaN where not even the image itself is answered for sure."""
        lost = inclusion("l2", norm, shape.numel()) * self.sigma * ndtri(self.vote.needed)
        found = super().radii(p, norm, shape) - lost
        return np.where(found >= 0, found, np.nan)

    def needed(self, eps: Array, norm: str, shape: torch.Size) -> Array:
        """Return the probabilities whose radii are eps."""
        return np.asarray(ndtr(ndtri(super().needed(eps, norm, shape)) + ndtri(self.vote.needed)))

    def run(self, model: Model, x: Tensor, y: Tensor, threat: Threat, streams: Streams) -> Certificate:
        """Certify one chunk by all n votes."""
        if not isinstance(threat, Lp):
            raise TypeError(f"{type(self).__name__} certifies Lp balls, got {type(threat).__name__}")
        return self.certify_votes(self._vote(model, x, streams, threat.bounds, None), y, threat)
