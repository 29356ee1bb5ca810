"""SimBA, the simple black-box attack: steps back and forth along the directions of an orthonormal basis.

Threat: linf and l2 with a budget, l2 also without (as near as possible). Access: scores.
Source: Guo, Gardner, You, Wilson and Weinberger 2019, "Simple Black-box Adversarial Attacks" (1905.07121); SimBA-DCT is
`SimBA(basis=DCT(...))`, whose original keeps an eighth of the frequencies of 224-pixel images along each axis.
Departures: steps are projected on the threat (the original has no budget but for queries); once a sample has gone
through all directions it goes on with a new order of them; probabilities are compared by their log-odds, which order
them alike, and do not saturate.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from robustbench_lite.attacks._purse import Purse
from robustbench_lite.attacks.base import Attack
from robustbench_lite.attacks.basis import Basis, Pixels
from robustbench_lite.core.checks import parse_number
from robustbench_lite.core.goals import Goal, Targeted
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["SimBA"]


@dataclass(frozen=True)
class SimBA(Attack):
    """A step down each direction, or else up, whenever that lowers the probability of the true class.

    Towards a target: whenever it raises that of the target. The directions come in random order.

    Attributes:
        basis: the directions: `Pixels()`, `DCT(fraction)` or `Tiles(side)`.
        step: length of a step in l2, in the units of the images; the default is for bounds (0, 1).
        queries: most forward passes for a sample, the clean check aside (the original: 10,000
            directions, at most two each).

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    basis: Basis = field(default_factory=Pixels)
    step: float | str = 0.2
    queries: int = 20_000

    def __post_init__(self) -> None:
        if not isinstance(self.basis, Basis):
            raise ValueError(f"basis must be Pixels(), DCT(fraction) or Tiles(side), got {self.basis!r}")
        if not parse_number(self.step) > 0:
            raise ValueError(f"step must be > 0, got {self.step}; for pixel units write '2/255'")
        if not isinstance(self.queries, int) or self.queries < 2:
            raise ValueError(f"queries must be a whole number, at least 2, got {self.queries!r}")

    @property
    def access(self) -> Access:
        """Scores are enough."""
        return Access.SCORES

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is an l2 ball, or an linf ball with a budget."""
        return isinstance(threat, Lp) and (threat.norm == "l2" or (threat.norm == "linf" and threat.eps is not None))

    @torch.no_grad()
    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Ask about one step of each sample at a time; each goes through its own order of the directions."""
        threat, directions = cast(Lp, threat), _Directions(self.basis, x)
        purse = Purse(oracle, self.queries)
        rows = purse.standing(1 + oracle.scores_cost)
        if len(rows) == 0:
            return oracle.best
        points, value = x[rows], _log_odds(oracle.scores(x[rows], rows, candidate=False), goal.take(rows))
        turn = torch.zeros_like(rows)  # directions that are behind
        up = torch.zeros_like(rows, dtype=torch.bool)  # the step down has failed
        order = directions.shuffle(streams.take(rows))
        for query in range((self.queries - 1) // oracle.scores_cost):
            if query % purse.compact_every == 0:
                keep = self._still(oracle, purse, threat, rows)
                if len(keep) < len(rows):
                    rows, points, value, turn, up, order = (t[keep] for t in (rows, points, value, turn, up, order))
                if len(rows) == 0:
                    break
            length = torch.where(up, 1, -1) * parse_number(self.step)
            moved = points + length.to(x.dtype).reshape(-1, 1, 1, 1) * directions(_at(order, turn))
            moved = moved.clamp(*threat.bounds) if threat.eps is None else threat.take(rows).project(moved, x[rows])
            new = _log_odds(oracle.scores(moved, rows, _log_odds), goal.take(rows))
            better = new > value
            points = torch.where(better.reshape(-1, 1, 1, 1), moved, points)
            value, turn, up = torch.where(better, new, value), turn + (better | up), ~(better | up)
            through = (turn == order.shape[1]).nonzero().flatten()
            if len(through):
                order[through] = directions.shuffle(streams.take(rows[through]))
                turn[through] = 0
        return oracle.best

    @staticmethod
    def _still(oracle: Oracle, purse: Purse, threat: Lp, rows: Tensor) -> Tensor:
        """Without a budget further steps lead farther away: the first success is the nearest."""
        keep = purse.still(rows, oracle.scores_cost)
        return keep[~oracle.found.fallen[rows[keep]]] if threat.eps is None else keep


class _Directions:
    """The images of single coefficients, as products of a column and a row of the basis."""

    def __init__(self, basis: Basis, x: Tensor) -> None:
        self._shape, self.count = x.shape[1:], basis.size(x.shape[1:])
        self._columns, self._rows = (basis.axis(side).to(x.device, x.dtype) for side in x.shape[2:])

    def shuffle(self, streams: Streams) -> Tensor:
        """Return an order of the directions for each sample, int32 (n, count)."""
        return streams.uniform(self.count, dtype=torch.float64).argsort(dim=1).int()

    def __call__(self, which: Tensor) -> Tensor:
        """Return the images (n, C, H, W) of coefficients `which`, int64 (n,), of length 1 in l2."""
        high, wide = len(self._columns), len(self._rows)
        plane = self._columns[which // wide % high].unsqueeze(2) * self._rows[which % wide].unsqueeze(1)
        channel = torch.nn.functional.one_hot(which // (high * wide), self._shape[0]).to(plane.dtype)
        return channel[:, :, None, None] * plane.unsqueeze(1)


def _at(order: Tensor, turn: Tensor) -> Tensor:
    return order.gather(1, turn.unsqueeze(1)).squeeze(1).long()


def _log_odds(logits: Tensor, goal: Goal) -> Tensor:
    """Return float64 (n,): log((1 - p) / p), p the probability of the true class; for a target log(p / (1 - p))."""
    column = goal.labels.unsqueeze(1)
    chosen = logits.double().gather(1, column).squeeze(1)
    odds = logits.double().scatter(1, column, -torch.inf).logsumexp(dim=1) - chosen
    return (-odds if isinstance(goal, Targeted) else odds).nan_to_num(nan=-torch.inf)
