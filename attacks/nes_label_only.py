"""NES from labels alone: the score of a point is how high its neighbours rank the target.

Threat: linf. Access: labels, or for k > 1 the top k without their probabilities.
Source: Ilyas, Engstrom, Athalye and Lin 2018, "Black-box Adversarial Attacks with Limited Queries and Information"
(1804.08598), with the settings of the authors' scripts.
Departures: those of `NESPartialInformation`. One estimate costs samples * m queries, 5,000 by default.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_lite.attacks._nes_schedule import ShrinkingNES
from robustbench_lite.attacks._score_estimator import blocks
from robustbench_lite.core.checks import parse_number
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams

__all__ = ["NESLabelOnly"]


@dataclass(frozen=True)
class NESLabelOnly(ShrinkingNES):
    """NES on the mean rank of a class around a point, while the ball around the clean image shrinks.

    The rank score of an answer is R = (k - rank) / k, with the rank counted from 0, or 0 outside the top k; the score
    of a point, S, is the mean of R over m uniform draws within u of it in linf. The loss is 1 - S.

    Attributes:
        k: classes that an answer shows.
        samples: probes of one estimate, an even number: mirrored pairs.
        sigma: standard deviation of the probes, in the units of the images; the default is for bounds (0, 1).
        lr: length of the first steps, in the units of the images; None: `eps / 5`.
        min_lr: length below which steps are not cut, in the units of the images; None: `eps / 500`.
        momentum: share of the old direction in the new one.
        plateau_length: losses in a window; when the newest is worse than the oldest, steps are cut.
        plateau_drop: what the length of the steps is then divided by.
        threshold: the ball shrinks while the loss is below this.
        conservative: the ball shrinks by the accepted cut over this.
        queries: forward passes that each sample may spend, the clean check aside.
        draws: images tried as a start, none of a gallery twice, until one has a wanted class.
        basis: where probes are drawn: `Pixels()`, `DCT(fraction)`, `Tiles(side)`.
        gallery: labelled images to start from; None: noise, which rarely has the class of a targeted goal.
        m: draws around each probe.
        u: how far they may lie from it, in the units of the images; the default is for bounds (0, 1).

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    plateau_length: int = 20
    threshold: float = 0.15
    conservative: float = 4.0
    queries: int = 1_000_000
    m: int = 50
    u: float | str = 2e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.m, int) or self.m < 1:
            raise ValueError(f"m must be a whole number of draws, at least 1, got {self.m!r}")
        if not parse_number(self.u) > 0:
            raise ValueError(f"u must be > 0, got {self.u}; it is in the units of the images")

    @property
    def access(self) -> Access:
        """Labels, or the top k."""
        return Access.LABEL if self.k == 1 else Access.TOPK

    @property
    def floor(self) -> float:
        """The default of `min_lr`, as a share of eps."""
        return 0.002

    @property
    def draws_in_losses(self) -> bool:
        """Yes: the noise of each draw."""
        return True

    @property
    def probe_cost(self) -> int:
        """One forward pass for each draw."""
        return self.m

    def losses(self, oracle: Oracle, probes: Tensor, rows: Tensor, target: Tensor, streams: Streams) -> Tensor:
        """Return 1 - S at probes (n, j, C, H, W): float64 (n, j)."""
        scores = torch.zeros(probes.shape[:2], dtype=torch.float64, device=probes.device)
        for column, probe in enumerate(probes.unbind(1)):
            for count in blocks(self.m):
                noise = 2 * streams.uniform(count, *probe.shape[1:], dtype=probe.dtype) - 1
                around = (probe.unsqueeze(1) + parse_number(self.u) * noise).flatten(0, 1)
                owners, wanted = rows.repeat_interleave(count), target.repeat_interleave(count)
                rank = self._rank_score(oracle, around, owners, wanted, candidate=False)
                scores[:, column] += rank.reshape(-1, count).sum(dim=1) / self.m
        return 1 - scores

    def shown(self, oracle: Oracle, points: Tensor, rows: Tensor, target: Tensor, candidate: bool) -> Tensor:
        """Say at which points (n, C, H, W) the target is in the top k: bool (n,)."""
        return self._rank_score(oracle, points, rows, target, candidate) > 0

    def _rank_score(self, oracle: Oracle, points: Tensor, rows: Tensor, target: Tensor, candidate: bool) -> Tensor:
        """Return R in float64 (n,)."""
        if self.k == 1:
            return (oracle.labels(points, rows, candidate=candidate) == target).double()
        match = oracle.topk(points, rows, self.k, candidate=candidate)[1] == target.unsqueeze(1)
        worth = torch.arange(self.k, self.k - match.shape[1], -1, device=match.device)
        return (match * worth).sum(dim=1).double() / self.k
