"""Square attack: random search with square windows.

Threat: linf, l2, l1. Access: scores.
Source: Andriushchenko, Croce, Flammarion and Hein 2019, "Square Attack: a query-efficient black-box adversarial attack
via random search" (1912.00049); for l1 Croce and Hein 2021, "Mind the box: l1-APGD for sparse adversarial attacks on
image classifiers" (2103.01208); p_init 0.8 and 5,000 queries are those of AutoAttack (Croce and Hein 2020, 2003.01690).
Departures: each sample draws its own windows (AutoAttack's batch shares them); a window may lie anywhere, the last row
and column included; images need not be square; in l2, what clipping to the image bounds takes from the change is given
back at once, so that candidates use the whole radius; the first candidate counts as a query.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from robustbench_lite.attacks._square_moves import MOVES
from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.goals import Goal
from robustbench_lite.core.losses import loss_named
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["Square"]

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries: past each, windows hold half as much
BLOCK = 32  # steps drawn at a time: a draw costs some 2 us a sample, whatever its size


@dataclass(frozen=True)
class Square(Attack):
    """Random search: change a random square window, and keep the change if the loss rises.

    Attributes:
        queries: most candidates in each restart; the window sizes are scheduled over it.
        p_init: share of the pixels in the first windows; it is halved after 0.1, 0.5, 2, 5, 10, 20, 40, 60 and 80 %
            of the queries.
        restarts: searches from fresh random starts.
        loss: "margin" or "ce".

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    queries: int = 5000
    p_init: float = 0.8
    restarts: int = 1
    loss: str = "margin"

    def __post_init__(self) -> None:
        for name, value in (("queries", self.queries), ("restarts", self.restarts)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
        if not 0 < self.p_init <= 1:
            raise ValueError(f"p_init is a share of the pixels, in (0, 1], got {self.p_init}")
        if self.loss not in ("margin", "ce"):
            raise ValueError(f"loss must be 'margin' or 'ce', got {self.loss!r}")

    @property
    def access(self) -> Access:
        """Scores are enough."""
        return Access.SCORES

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is a ball with a budget in one of the norms."""
        return isinstance(threat, Lp) and threat.norm in MOVES and threat.eps is not None

    def share(self, step: int) -> float:
        """Return the share of the pixels in the window of this step, 0 .. queries - 1."""
        position = 10_000 * step // self.queries
        return self.p_init / float(2 ** sum(position > halving for halving in HALVINGS))

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Search `restarts` times, each on the samples that still stand."""
        for _ in range(self.restarts):
            self.search(oracle, oracle.standing(oracle.scores_cost), cast(Lp, threat), streams)
        return oracle.best

    @torch.no_grad()
    def search(self, oracle: Oracle, rows: Tensor, threat: Lp, streams: Streams) -> None:
        """Search for `rows`, int64 (n,), of the batch; the threat and the streams are those of the whole batch."""
        loss = loss_named(self.loss)
        if len(rows) == 0:
            return
        moves = MOVES[threat.norm](oracle.x[rows], threat.take(rows), streams.take(rows))
        oracle.scores(moves.points, rows, loss)
        value = oracle.losses.nan_to_num(nan=-torch.inf)
        late = oracle.ranks_by(loss)  # then the current point is the best one to keep
        for step in range(self.queries - 1):
            if step % oracle.compact_every == 0:
                keep = oracle.still(rows, oracle.scores_cost)
                if keep.numel() < rows.numel():
                    if late and oracle.max_queries is not None:  # who cannot pay leaves without having fallen
                        oracle.keep(moves.points, rows, value)
                    rows, value, moves = rows[keep], value[keep], moves.take(keep)
                if keep.numel() == 0:
                    return
            if step % BLOCK == 0:
                ahead = [moves.side(self.share(at)) for at in range(step, min(step + BLOCK, self.queries - 1))]
                moves.plan(ahead, streams.take(rows).uniform(BLOCK, moves.draws)[:, : len(ahead)])
            changed = moves.change(step % BLOCK)
            with oracle.only_successes() if late else nullcontext():
                oracle.scores(changed, rows, loss)
            better = oracle.losses > value
            value = torch.where(better, oracle.losses, value)
            moves.settle(better)
        if late:
            oracle.keep(moves.points, rows, value)
