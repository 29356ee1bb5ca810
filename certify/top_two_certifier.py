"""Certificates from two numbers: bounds on the probabilities of the chosen class and of its strongest rival."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from robustbench_lite.certify._binomial import clopper_pearson_lower, clopper_pearson_upper
from robustbench_lite.certify.smoothing_certifier import SmoothingCertifier
from robustbench_lite.certify.votes import Votes

__all__ = ["TopTwoCertifier"]

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class TopTwoCertifier(SmoothingCertifier):
    """The chosen class against its strongest rival.

    The chosen class is bounded from below and each of the K - 1 others from above, each by Clopper-Pearson at level
    alpha / K, so that all bounds hold together with probability 1 - alpha (Bonferroni). The number of draws is fixed.
    """

    norms: ClassVar[tuple[str, ...]] = ("l2", "l1", "linf")

    def largest_radius(
        self,
        norm: str,
        shape: torch.Size,
        num_classes: int | None = None,
        sensitivity: Mapping[str, float] | None = None,
    ) -> float:
        """Return the radius in `norm` that n unanimous votes of `num_classes` classes prove."""
        if num_classes is None or num_classes < 2:
            raise ValueError(
                f"{type(self).__name__} bounds each of K classes at level alpha / K: give num_classes >= 2 (of votes, "
                f"votes.counts.shape[1]), got {num_classes}"
            )
        return super().largest_radius(norm, shape, num_classes, sensitivity)

    @abstractmethod
    def radii(self, p1: Array, p2: Array, norm: str, votes: Votes) -> Array:
        """Return the radii (B,) that p(chosen) >= p1 > p2 >= p(any other) prove."""

    def proven(self, votes: Votes, norm: str) -> Array:
        """Return the radii (B,) by the two bounds; NaN where they do not tell the two classes apart."""
        num_classes = votes.counts.shape[1]
        level = self.alpha / num_classes
        rivals = votes.counts.scatter(1, votes.chosen.unsqueeze(1), -1).amax(dim=1)
        first, second, draws = (t.double().cpu().numpy() for t in (votes.successes, rivals, votes.draws))
        p1 = clopper_pearson_lower(first, draws, level)
        p2 = clopper_pearson_upper(second, draws, level)  # at most 1 - p1, as second <= draws - first
        ahead = p1 > p2
        found = np.full(len(p1), np.nan)
        found[ahead] = self.radii(p1[ahead], p2[ahead], norm, votes)
        return found
