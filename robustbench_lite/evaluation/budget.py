"""A budget for a whole run: what may be spent, what was, and in what order it is spent where it pays.

Clean answers are always given. Then come the cheap proofs, the attacks, the dear proofs. Each attack first meets a
small slice of the first unit; from then on those go first that broke most per second there (per forward pass where
only queries are limited). A batch begins only if it fits, by what the method has cost so far, so that a run ends about
where its budget does: over it by what a first sample, or a misjudged batch, costs. Rows from the store cost nothing,
and tell what the method costs: a run with more budget takes the same order, and goes on where the last one ended.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["SLICE", "Budget", "Purse"]

SLICE = 16  # samples that attacks are compared on, of those that are right and unproven


@dataclass(frozen=True)
class Budget:
    """What a run may spend on what it computes.

    Attributes:
        queries: forward passes, over all samples and methods; None for no limit.
        minutes: from the first clean answer on; None for no limit.

    Raises:
        ValueError: a limit that is not positive.
    """

    queries: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("queries", self.queries), ("minutes", self.minutes)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < math.inf):
                raise ValueError(f"budget.{name} must be a positive number, or None for no limit, got {value!r}")

    @property
    def limited(self) -> bool:
        """Whether there is a limit at all."""
        return self.queries is not None or self.minutes is not None


class Purse:
    """What a run has spent of its budget.

    Args:
        budget: the limits.
        clock: seconds that only grow.
    """

    def __init__(self, budget: Budget, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget, self._clock, self._start = budget, clock, clock()
        self.queries = 0
        self._known: dict[str, tuple[int, float, int]] = {}  # samples, seconds and forwards of each cell

    @property
    def minutes(self) -> float:
        """Minutes since the run began."""
        return (self._clock() - self._start) / 60

    def affords(self, key: str, most: int) -> int:
        """Return how many samples a method may be asked about next, at most `most`; 0: none that would fit.

        One, where nothing is known of its cost.
        """
        if not self.budget.limited:
            return most
        samples, seconds, forwards = self._known.get(key, (0, 0.0, 0))
        fits = float(most if samples else 1)
        for limit, spent, cost in (
            (self.budget.minutes, self.minutes, seconds / 60),
            (self.budget.queries, self.queries, forwards),
        ):
            if limit is not None and spent >= limit:
                return 0
            if limit is not None and cost > 0:
                fits = min(fits, (limit - spent) * samples / cost)
        return int(fits)

    def pay(self, key: str, rows: pa.Table) -> None:
        """Book rows that were computed."""
        if not self.budget.limited:
            return
        self.queries += _sum(rows, "forwards")
        self.learn(key, rows)

    def learn(self, key: str, rows: pa.Table) -> None:
        """Take from rows, computed or stored, what a method costs."""
        if not self.budget.limited or len(rows) == 0:
            return
        samples, seconds, forwards = self._known.get(key, (0, 0.0, 0))
        more = float(pc.sum(rows.column("seconds")).as_py() or 0.0)
        self._known[key] = samples + len(rows), seconds + more, forwards + _sum(rows, "forwards")

    def worth(self, rows: pa.Table) -> float:
        """Return successes per second, or per forward pass where only queries are limited, in these rows."""
        unit = "seconds" if self.budget.minutes is not None else "forwards"
        spent = float(pc.sum(rows.column(unit)).as_py() or 0.0)
        return _sum(rows, "success") / max(spent, 1e-9)

    def __str__(self) -> str:
        """Say what was spent of what."""
        parts = []
        if self.budget.queries is not None:
            parts.append(f"{self.queries} of {self.budget.queries} queries")
        if self.budget.minutes is not None:
            parts.append(f"{self.minutes:.1f} of {self.budget.minutes:g} minutes")
        return " and ".join(parts) + " spent"


def _sum(rows: pa.Table, column: str) -> int:
    return int(pc.sum(rows.column(column)).as_py() or 0)
