"""Random noise: the floor under every attack, and the flag when it finds what gradients miss.

Threat: any with a budget. Access: labels.
Source: recommended as a check of gradient attacks by Carlini et al. 2019, "On Evaluating Adversarial Robustness"
(1902.06705); on rotations and translations it is the worst-of-k attack of Engstrom et al. 2017 (1712.02779).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.goals import Goal
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Threat

__all__ = ["RandomNoise"]


@dataclass(frozen=True)
class RandomNoise(Attack):
    """Independent uniform draws from the threat.

    Attributes:
        draws: points drawn for each sample.

    Raises:
        ValueError: `draws` below 1.
    """

    draws: int = 100

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}")

    @property
    def access(self) -> Access:
        """Labels are enough."""
        return Access.LABEL

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat has a budget to draw within."""
        return threat.size is not None

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Try one draw after the other; a sample leaves at its first success."""
        for draw in range(self.draws):
            if draw % oracle.compact_every == 0:
                rows = oracle.standing(oracle.judge_cost)
                rows_streams, rows_threat = streams.take(rows), threat.take(rows)
            if len(rows) == 0:
                break
            oracle.judge(rows_threat.random_point(x[rows], rows_streams), rows)
        return oracle.best
