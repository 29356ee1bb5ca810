"""Fast minimum-norm from the far side: from adversarial noise to the nearest point that stays adversarial.

Threat: linf, l2, l1, l0; with a budget, or without (as near as possible). Access: gradients.
Source: Pintor, Roli, Brendel and Biggio 2021, "Fast Minimum-norm Adversarial Attacks through Adaptive Norm
Constraints" (2102.12827), whose searches may begin at adversarial points, brought to the boundary by halving the way.
Noise as such a point is from Brendel, Rauber and Bethge 2018, "Decision-Based Adversarial Attacks" (1712.04248);
gradients there, where those at the clean image mislead, are the idea of Brendel, Rauber, Kuemmerer, Ustyuzhaninov and
Bethge 2019, "Accurate, reliable and fast robustness evaluation" (1907.01003).
A net that was trained against small changes of every pixel is flat around its training images, and large changes of a
few pixels fool it. A search from the clean image does not see them; one that comes from outside crosses no flat place
(`benchmarks/quick_auto_attack.py`, `benchmarks/minimum_norm.py --ours FarFMN`). On other nets `FMN` comes nearer for
the same passes, above all in l0. On a randomised model each apparent success on the way is put to the vote: dear.
Departures: steps are shares of the distance to the clean image, so that one schedule serves starts at any distance;
the radius falls faster, as it has a longer way, and may exceed a budget; the way is halved along the line in l1 and l0
too; where no noise fools the model, the search begins at noise all the same; further those of `FMN`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from robustbench_lite.attacks._closing_in import Search
from robustbench_lite.attacks._decision import bisect, cut, noise, random_start, straight
from robustbench_lite.attacks._purse import Purse
from robustbench_lite.attacks.fmn import FMN
from robustbench_lite.core.goals import Goal
from robustbench_lite.core.norms import NORMS
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["FarFMN"]


@dataclass(frozen=True)
class FarFMN(FMN):
    """FMN from noise images that fool the model, one after the other; with a budget until a search ends inside.

    Attributes:
        steps: gradient steps from each start.
        alpha_init: l2 length of the first step, as a share of the l2 distance to the clean image; along a cosine.
        alpha_final: that share for the last step; None: `alpha_init / 100`.
        gamma_init: share by which the radius shrinks or grows at first; it falls along a cosine.
        gamma_final: that share in the end.
        restarts: starts.
        draws: noise images tried for a start.
        halvings: times that the way from the clean image to the start is halved before the first step.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    steps: int = 60
    alpha_init: float = 0.3
    gamma_init: float = 0.3
    restarts: int = 5
    draws: int = 10
    halvings: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("restarts", "draws", "halvings"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Search from each start in turn."""
        self.search(oracle, oracle.standing(), cast(Lp, threat), streams)
        return oracle.best

    def search(self, oracle: Oracle, rows: Tensor, threat: Lp, streams: Streams) -> None:
        """Search for `rows`, int64 (n,), ascending; threat and streams are those of the whole batch."""
        for restart in range(self.restarts):
            rows = rows[oracle.still(rows, oracle.gradient_cost)]
            starts = self._starts(oracle, rows, threat, streams.fork(restart))
            self._close_in(oracle, rows, Search.outside(oracle.x[rows], threat, starts))

    def _starts(self, oracle: Oracle, rows: Tensor, threat: Lp, streams: Streams) -> Tensor:
        """Return images (n, C, H, W) just beyond the boundary; where no noise fools the model, noise."""
        purse, blend = Purse(oracle, None), cut if threat.norm == "linf" else straight
        found, far = random_start(oracle, purse, rows, streams, self.draws)
        fooled = torch.isin(rows, found)
        starts, others = torch.empty_like(oracle.x[rows]), rows[~fooled]
        starts[fooled] = bisect(oracle, purse, found, far, self.halvings, blend)
        starts[~fooled] = noise(oracle.x[others], streams.take(others), 0, threat.bounds)
        return starts

    def _sizes(self, cosine: float, search: Search) -> tuple[float | Tensor, float]:
        """Return the l2 lengths of a step (n, 1, 1, 1), and the share by which radii change."""
        share, gamma = super()._sizes(cosine, search)
        return share * NORMS["l2"].size(search.points - search.x).reshape(-1, 1, 1, 1), gamma
