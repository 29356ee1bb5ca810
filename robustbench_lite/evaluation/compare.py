"""Comparisons of accuracies on the same samples: McNemar's exact test, corrected by Holm for their number.

Two lines are compared on the samples that both have. Those on which both stand, or both fall, say nothing; of the
others each line wins some, under the hypothesis of no difference as often as a fair coin. The p-value is that of the
two-sided binomial test: McNemar, "Note on the sampling error of the difference between correlated proportions or
percentages", Psychometrika 1947. Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal
of Statistics 1979, keeps the chance of a single false claim among all comparisons below `ALPHA`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import bdtr

from robustbench_lite.evaluation.lines import Names, Outcomes

__all__ = ["ALPHA", "Comparison", "compare", "holm", "mcnemar"]

ALPHA = 0.05

_Real = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Comparison:
    """All pairs of L lines, each on the samples that both have.

    Attributes:
        common: int (L, L), how many samples both have.
        both: int (L, L), on how many of them both stand.
        only: int (L, L), on how many of them the first stands and the second does not.
        p: (L, L), p-values corrected for the number of pairs; 1 on the diagonal, and where nothing is shared.
    """

    common: np.ndarray[Any, Any]
    both: np.ndarray[Any, Any]
    only: np.ndarray[Any, Any]
    p: _Real

    @property
    def better(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Bool (L, L): the first is significantly better than the second."""
        better: np.ndarray[Any, np.dtype[np.bool_]] = (self.p <= ALPHA) & (self.only > self.only.T)
        return better


def mcnemar(only_first: ArrayLike, only_second: ArrayLike) -> _Real:
    """Return the exact two-sided p-values of McNemar's test for counts of discordant pairs; 1 where there are none.

    >>> mcnemar(0, 10).item() == 2 / 2**10
    True
    """
    first, second = (np.asarray(counts, dtype=np.int64) for counts in (only_first, only_second))
    p: _Real = np.minimum(1.0, 2 * bdtr(np.minimum(first, second), first + second, 0.5))
    return np.where(first + second == 0, 1.0, p)


def holm(p_values: ArrayLike) -> _Real:
    """Return the adjusted p-values (n,): at most ALPHA where Holm's procedure rejects at the level ALPHA.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    raised = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, raised)
    return adjusted


def compare(lines: Sequence[Outcomes]) -> Comparison:
    """Compare all pairs of lines."""
    places, total = _places([line.names for line in lines])
    seen, standing = (np.zeros((len(lines), total)) for _ in range(2))
    for row, (line, place) in enumerate(zip(lines, places, strict=True)):
        seen[row, place] = 1.0
        standing[row, place] = line.standing
    common, both, only = (
        np.rint(a @ b.T).astype(np.int64) for a, b in ((seen, seen), (standing, standing), (standing, seen - standing))
    )
    rows, columns = np.triu_indices(len(lines), k=1)
    p = np.ones((len(lines), len(lines)))
    p[rows, columns] = p[columns, rows] = holm(mcnemar(only[rows, columns], only[columns, rows]))
    return Comparison(common, both, only, p)


def _places(names: Sequence[Names]) -> tuple[list[np.ndarray[Any, Any]], int]:
    """Return the place of each sample of each line among all samples, and their number."""
    if not names:
        return [], 0
    distinct = list({id(own): own for own in names}.values())
    if len(distinct) == 1:
        return [np.arange(len(distinct[0]))] * len(names), len(distinct[0])
    frames = [pd.DataFrame({"index": o.index, "hash": o.sample_hash, "label": o.label}) for o in distinct]
    codes = pd.concat(frames, ignore_index=True).groupby(["index", "hash", "label"]).ngroup().to_numpy()
    cuts = np.cumsum([0, *(len(own) for own in distinct)])
    place = {id(own): codes[a:b] for own, a, b in zip(distinct, cuts[:-1], cuts[1:], strict=True)}
    return [place[id(own)] for own in names], int(codes.max()) + 1
