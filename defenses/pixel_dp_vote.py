"""PixelDP's certificate, for an answer that is the winner of a finite vote."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbench_lite.certify.pixel_dp import PixelDP
from robustbench_lite.certify.votes import Votes
from robustbench_lite.core.models import Model
from robustbench_lite.core.results import Certificate
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["PixelDPVote"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class PixelDPVote(PixelDP):
    """The ball in which a vote of `draws` gives the class with probability 1 - alpha, by differential privacy.

    `PixelDP` proves where the class is the most likely one, be it by a hair. The votes N of m draws tell it from a
    rival with certainty enough if it leads by t = sqrt(2 ln((K + 1) / alpha) / m): by Hoeffding P(N_j >= N_c) <=
    exp(-m t^2 / 2) = alpha / (K + 1) for each of the K rivals. They are the K - 1 other classes and the answers that
    are not finite, which win a vote like a class; so p2 bounds K + 1 outcomes, at level alpha / (K + 1) each. Under a
    change that moves the noisy layer by what is (eps, delta)-private, the lead is at least e^-eps (p1 - delta) -
    e^eps p2 - delta, so

        p1 > e^(2 eps) (p2 + t) + (1 + e^eps) delta

    is enough: `PixelDP` with the rival's bound raised by t.

    Departure from `PixelDP`: an eps that n votes cannot prove is not certified, and no error, for a defense may be
    asked about any threat.

    Attributes:
        draws: votes of an answer.
    """

    version: ClassVar[int] = 2
    draws: int = 1000

    def proven(self, votes: Votes, norm: str) -> Array:
        """Return the radii (B,), with the draws that counted for no class as one class more, which is never chosen."""
        none = votes.draws - votes.counts.sum(dim=1)
        return super().proven(replace(votes, counts=torch.cat([votes.counts, none.unsqueeze(1)], dim=1)), norm)

    def radii(self, p1: Array, p2: Array, norm: str, votes: Votes) -> Array:
        """Return the radii; NaN where not even the image itself is answered for sure.

        `votes.counts` has a column for each outcome, (B, K + 1).
        """
        lead = math.sqrt(2 * math.log(votes.counts.shape[1] / self.alpha) / self.draws)
        raised = np.minimum(p2 + lead, p1)
        return np.where(p1 > raised, super().radii(p1, raised, norm, votes), np.nan)

    def run(self, model: Model, x: Tensor, y: Tensor, threat: Threat, streams: Streams) -> Certificate:
        """Certify one chunk by all n votes."""
        if not isinstance(threat, Lp):
            raise TypeError(f"{type(self).__name__} certifies Lp balls, got {type(threat).__name__}")
        return self.certify_votes(self._vote(model, x, streams, threat.bounds, None), y, threat)
