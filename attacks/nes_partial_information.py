"""NES with partial information: the k most probable classes are seen, with their probabilities.

Threat: linf. Access: top k.
Source: Ilyas, Engstrom, Athalye and Lin 2018, "Black-box Adversarial Attacks with Limited Queries and Information"
(1804.08598), with the settings of the authors' scripts.
Departures: the target of an untargeted goal is the class of the start. The start is an image of a `Gallery` where there
is one, else noise in tiles of several sizes, blind to the other samples of the batch; it is drawn near by bisection
(10 queries) before the first estimate, and eps starts at its distance, not at 1. Step sizes are shares of eps, which at
the original's 0.05 are its 0.01 and 0.001; cuts of eps are shares of the image range. Where some probes lose sight of
the target, the mean loss is taken off the others first: the pairs that break would drown the rest. A step for which no
cut will do is left out, where the original gives up. Each forward counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_lite.attacks._nes_schedule import ShrinkingNES
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams

__all__ = ["NESPartialInformation"]


@dataclass(frozen=True)
class NESPartialInformation(ShrinkingNES):
    """NES on the probability of a class that is kept in the top k, while the ball around the clean image shrinks.

    Attributes:
        k: classes that an answer shows.
        samples: probes of one estimate, an even number: mirrored pairs.
        sigma: standard deviation of the probes, in the units of the images; the default is for bounds (0, 1).
        lr: length of the first steps, in the units of the images; None: `eps / 5`.
        min_lr: length below which steps are not cut, in the units of the images; None: `eps / 50`.
        momentum: share of the old direction in the new one.
        plateau_length: losses in a window; when the newest is worse than the oldest, steps are cut.
        plateau_drop: what the length of the steps is then divided by.
        threshold: the ball shrinks while the cross-entropy to the target is below this.
        conservative: the ball shrinks by the accepted cut over this.
        queries: forward passes that each sample may spend, the clean check aside.
        draws: images tried as a start, none of a gallery twice, until one has a wanted class.
        basis: where probes are drawn: `Pixels()`, `DCT(fraction)`, `Tiles(side)`.
        gallery: labelled images to start from; None: noise, which rarely has the class of a targeted goal.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    sigma: float | str = 1e-5

    @property
    def access(self) -> Access:
        """The top k classes and their probabilities."""
        return Access.TOPK

    @property
    def floor(self) -> float:
        """The default of `min_lr`, as a share of eps."""
        return 0.02

    @property
    def draws_in_losses(self) -> bool:
        """No: scores need no noise."""
        return False

    @property
    def probe_cost(self) -> int:
        """One forward pass."""
        return 1

    def losses(self, oracle: Oracle, probes: Tensor, rows: Tensor, target: Tensor, streams: Streams) -> Tensor:
        """Return the cross-entropy to the target at probes (n, j, C, H, W): float64 (n, j), NaN where unseen."""
        count = probes.shape[1]
        owners, wanted = rows.repeat_interleave(count), target.repeat_interleave(count)
        values, classes = oracle.topk(probes.flatten(0, 1), owners, self.k, candidate=False)
        match = classes == wanted.unsqueeze(1)
        probability = torch.where(match, values.double(), 0).sum(dim=1)
        return torch.where(match.any(dim=1), -probability.log(), torch.nan).reshape(-1, count)

    def shown(self, oracle: Oracle, points: Tensor, rows: Tensor, target: Tensor, candidate: bool) -> Tensor:
        """Say at which points (n, C, H, W) the target is in the top k: bool (n,)."""
        classes = oracle.topk(points, rows, self.k, candidate=candidate)[1]
        return (classes == target.unsqueeze(1)).any(dim=1)
