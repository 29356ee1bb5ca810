"""What samples may still spend: the oracle's budget, and the limit that an attack sets itself."""

from __future__ import annotations

import torch
from torch import Tensor

from robustbench_lite.core.oracle import VOTES, Oracle

__all__ = ["Purse"]


class Purse:
    """The forward passes that samples may still spend on questions.

    The attack's own limit is exact on randomised models, too: there a success is confirmed by a vote, whose forward
    passes are set aside. A sample that can no longer pay for one stops, as no success of its would be believed.

    Args:
        oracle: the oracle that counts.
        queries: most forward passes a sample spends from now on, votes included; None for no limit but the oracle's.
    """

    def __init__(self, oracle: Oracle, queries: int | None) -> None:
        self._oracle = oracle
        votes = sum(VOTES) if oracle.stochastic else 0
        self._end = None if queries is None else oracle.forwards + queries - votes

    @property
    def compact_every(self) -> int:
        """Steps between two looks at who still stands, as the oracle's; a limit needs each one."""
        return self._oracle.compact_every if self._end is None else 1

    def left(self, rows: Tensor) -> Tensor:
        """Return the forward passes left to `rows`, int64 (n,); 2^62 where nothing limits them."""
        spent = self._oracle.forwards[rows]
        left = torch.full_like(spent, 2**62)
        if self._oracle.max_queries is not None:
            left = self._oracle.max_queries - spent
        return left if self._end is None else torch.minimum(left, self._end[rows] - spent)

    def still(self, rows: Tensor, queries: int = 1) -> Tensor:
        """Return the positions within `rows` of those that still search and can pay."""
        keep = self._oracle.still(rows, queries)
        return keep if self._end is None else keep[self.left(rows[keep]) >= queries]

    def standing(self, queries: int = 1) -> Tensor:
        """Return the rows, int64 (n,), that still search and can pay."""
        return self.still(torch.arange(len(self._oracle.x), device=self._oracle.x.device), queries)
