"""Minimise rows of C z over a threat around one image, as far as a decision or a time limit asks for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from robustbench_lite.certify._milp import Solution
from robustbench_lite.certify._network_programme import cut, given, tightened
from robustbench_lite.certify._questions import Built, Question

__all__: list[str] = []

Floats: TypeAlias = NDArray[np.float64]

DEPTH = 10.0  # a search for a counterexample stops once none can be more than 1 + DEPTH times as deep as the best


class Clock:
    """Counts down."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds left; negative when time is up."""
        return self._end - time.monotonic()


@dataclass(eq=False)
class Answer:
    """What is known about the rows of a question.

    Attributes:
        lower: (S,) nothing in the threat has a smaller value; NaN where the network's values overflow.
        unfinished: whether the time limit left a row undecided.
        counterexample: (1, C, H, W), if one was found.
    """

    lower: Floats
    unfinished: bool = False
    counterexample: Tensor | None = None


def decide(
    question: Question,
    shown: Callable[[Tensor], Tensor | None],
    counterexample: Tensor | None = None,
    *,
    tolerance: float,
    seconds: float,
    every_row: bool,
) -> Answer:
    """Find out for each row whether its minimum exceeds `tolerance`.

    Linear programmes over what is known about each layer, then over bounds that are themselves found by linear
    programmes, layer by layer; what these leave open goes to the mixed-integer programme. The easiest rows come first
    there, each with an equal share of the time left, so that the last one gets what the others did not need.

    Args:
        question: what is asked; rows of zeros are not looked at.
        shown: returns the counterexample, if any, that an image of the threat gives; called with the points where the
            programmes attain their minima.
        counterexample: if one is known.
        tolerance: what a minimum has to exceed.
        seconds: time limit.
        every_row: whether to go on with the other rows once there is a counterexample.
    """
    clock = Clock(seconds)
    answer = Answer(np.where(question.C.any(axis=1), -np.inf, np.inf), counterexample=counterexample)

    def open_rows() -> list[int]:
        if answer.counterexample is not None and not every_row:
            return []
        return sorted(np.flatnonzero(~(answer.lower > tolerance)).tolist(), key=lambda s: float(answer.lower[s]))

    def learn(built: Built, s: int, solution: Solution) -> None:
        answer.lower[s] = max(answer.lower[s], solution.lower)
        point = built.found(solution) if answer.counterexample is None else None
        if point is not None:
            answer.counterexample = shown(point)

    first = cut(question.known, 0)
    for bounds in (first, tightened(first, clock.left)):
        built = question.programme(bounds)
        if not _usable(built):
            return Answer(np.full(len(question.C), np.nan))
        answer.lower = np.maximum(answer.lower, built.programme.range(built.values)[0])
        for s in open_rows():
            if s in open_rows():
                learn(built, s, built.programme.minimise(built.row(s), relaxed=True, seconds=clock.left()))
        if not open_rows():
            return answer
    ceiling = 2 * (tolerance + built.programme.room) + 1e-9
    rows = open_rows()[::-1]
    for place, s in enumerate(rows):
        if s not in open_rows():
            continue
        share = clock.left() / (len(rows) - place)
        solution = built.programme.minimise(built.row(s), seconds=share, gap=DEPTH, ceiling=ceiling)
        learn(built, s, solution)
        answer.unfinished |= not solution.finished and answer.lower[s] <= tolerance
    return answer


def minima(question: Question, value: Callable[[Tensor], Floats], seconds: float) -> tuple[Floats, Floats]:
    """Return bounds (S,) below and above the minimum of each row, as close as the solver and the time allow.

    Args:
        question: what is asked.
        value: C z (S,) at an image of the threat.
        seconds: time limit.
    """
    clock = Clock(seconds)
    built = question.programme(tightened(given({}, 0), clock.left))
    upper = value(question.x)
    if not _usable(built):
        return np.full_like(upper, np.nan), np.full_like(upper, np.nan)
    lower = built.programme.range(built.values)[0]
    for s in np.flatnonzero(question.C.any(axis=1)).tolist():  # a row of zeros is 0 by its interval bounds
        row = built.row(s)
        for relaxed in (True, False):
            ceiling = math.inf if relaxed else float(upper[s]) + 2 * built.programme.room + 1e-6
            share = clock.left() / (len(lower) - s)
            solution = built.programme.minimise(row, relaxed=relaxed, seconds=share, ceiling=ceiling)
            lower[s] = max(lower[s], solution.lower)
            point = built.found(solution)
            if point is not None:
                upper = np.minimum(upper, value(point))
    return np.minimum(lower, upper), upper


def _usable(built: Built) -> bool:
    value, finite = built.values, np.isfinite
    return bool(finite(value.matrix.data).all() and finite(value.offset).all()) and built.programme.is_reliable
