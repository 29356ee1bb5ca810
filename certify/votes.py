"""Votes of a base classifier on randomly corrupted copies of images: one run serves every bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Votes"]


@dataclass(frozen=True, eq=False)
class Votes:
    """What a base classifier answered; abstentions and answers that are not finite count for no class.

    Attributes:
        selection: int64 (B, K) answers on the draws that choose the class.
        counts: int64 (B, K) answers on other draws, which measure how likely the class is.
        n0: number of draws behind `selection`.
        draws: int64 (B,) number of draws behind `counts`.
        shape: (C, H, W) of the images.
        source: what the copies were corrupted with; only certifiers with the same `source` can read the votes.
        sensitivity: for noise inside the net, by norm of the input, how far the noisy layer moves at most when the
            input moves by 1; empty for noise on the input.
    """

    selection: Tensor
    counts: Tensor
    n0: int
    draws: Tensor
    shape: torch.Size
    source: tuple[object, ...]
    sensitivity: Mapping[str, float] = field(default_factory=dict)

    @property
    def chosen(self) -> Tensor:
        """int64 (B,) the class with most votes in the selection."""
        return self.selection.argmax(dim=1)

    @property
    def successes(self) -> Tensor:
        """int64 (B,) votes for the chosen class among `counts`."""
        return self.counts.gather(1, self.chosen.unsqueeze(1)).squeeze(1)
