"""Certificates from one number: a lower bound on the probability of the class that was chosen."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbench_lite.certify._binomial import upper_tail
from robustbench_lite.certify._corruptions import AddedNoise, Corruption
from robustbench_lite.certify._inclusion import inclusion
from robustbench_lite.certify._vote_checks import budget, check_votes
from robustbench_lite.certify.noise import Noise
from robustbench_lite.certify.smoothing_certifier import ROUNDING, SmoothingCertifier
from robustbench_lite.certify.stopping import FixedSampleSize, Stopping
from robustbench_lite.certify.votes import Votes
from robustbench_lite.core.models import Model
from robustbench_lite.core.threats import Lp

__all__ = ["AddedNoiseCertifier", "MajorityCertifier"]

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class MajorityCertifier(SmoothingCertifier):
    """The chosen class against all others together: it stands while its probability exceeds 1/2.

    Attributes:
        stopping: `FixedSampleSize()`, or `EarlyStopping()`, which stops once it is settled whether eps can be proven.
            A sample that stops early has a smaller `radius` than n draws would prove, and may abstain.

    Raises:
        ValueError: another plan than one of these, or as in `SmoothingCertifier`.
    """

    stopping: Stopping = field(default_factory=FixedSampleSize)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.stopping, Stopping):
            raise ValueError(f"stopping must be FixedSampleSize() or EarlyStopping(), got {self.stopping!r}")

    @abstractmethod
    def radii(self, p: Array, norm: str, shape: torch.Size) -> Array:
        """Return the radii that a probability above `p` (B,) proves; NaN where p <= 1/2."""

    @abstractmethod
    def needed(self, eps: Array, norm: str, shape: torch.Size) -> Array:
        """Return the probabilities (B,) of the chosen class that eps (B,) needs: the inverse of `radii`."""

    @property
    def plan(self) -> Stopping:
        """When to stop drawing."""
        return self.stopping

    def proven(self, votes: Votes, norm: str) -> Array:
        """Return the radii (B,) by the lower bound on the chosen class's probability."""
        successes, draws = (t.double().cpu().numpy() for t in (votes.successes, votes.draws))
        p = self.stopping.lower(successes, draws, self.alpha)
        return np.where(p > 0.5, self.radii(p, norm, votes.shape), np.nan)

    def p_values(self, votes: Votes, threat: Lp) -> Array:
        """Return the p-values (B,) of "the chosen class is not robust to the threat", for `holm`.

        For the whole set to be right a rejected sample has to be of the right class too.

        Raises:
            ValueError: votes that stopped early (all have to be of n draws: a p-value supposes that their number was
                fixed), or as in `certify_votes`.
        """
        check_votes(self, votes, threat)
        if not bool((votes.draws == self.n).all()):
            raise ValueError(
                f"p-values need n = {self.n} draws of each sample, got {int(votes.draws.min())} to "
                f"{int(votes.draws.max())}: take the votes by `votes`, which does not stop early"
            )
        needed = self.needed(budget(threat, len(votes.draws)), threat.norm, votes.shape)
        successes, draws = (t.double().cpu().numpy() for t in (votes.successes, votes.draws))
        return upper_tail(successes, draws, np.minimum(needed, 1.0))  # a uniform law's goes on beyond 1


@dataclass(frozen=True, kw_only=True)
class AddedNoiseCertifier(MajorityCertifier):
    """Votes under noise that is added to the image; a radius in the noise's norm holds in the others by inclusion.

    A ball of another norm that lies in the noise's ball is certified as well: l2 proves linf at R / sqrt(d) and l1 at
    R; l1 proves l2 at R / sqrt(d) and linf at R / d, d being the number of values of an image.
    """

    norms: ClassVar[tuple[str, ...]] = ("l2", "l1", "linf")

    @property
    @abstractmethod
    def noise(self) -> Noise:
        """What is added to the image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.noise  # noqa: B018  (it checks its parameter)

    @property
    def source(self) -> tuple[object, ...]:
        """The noise."""
        return (self.noise,)

    def corruption(self, model: Model, x: Tensor, bounds: tuple[float, float]) -> Corruption:
        """Return the addition of noise."""
        return AddedNoise(self.noise)

    def radii(self, p: Array, norm: str, shape: torch.Size) -> Array:
        """Return the noise's radii times the inclusion of the norms."""
        return (1 - ROUNDING) * inclusion(self.noise.norm, norm, shape.numel()) * self.noise.radius(p)

    def needed(self, eps: Array, norm: str, shape: torch.Size) -> Array:
        """Return the probabilities whose radii are eps."""
        return self.noise.probability(eps / (1 - ROUNDING) / inclusion(self.noise.norm, norm, shape.numel()))
