"""The fast gradient sign method: one step to the edge of the threat.

Threat: linf, l2, l1. Access: gradients.
Source: Goodfellow, Shlens and Szegedy 2014, "Explaining and Harnessing Adversarial Examples" (1412.6572); the random
start followed by a longer step is that of Wong, Rice and Kolter 2020 (2001.03994).
Departures: other norms take the norm's steepest step. Useful for training and as a sanity check; never evidence of
robustness, since nets trained against it can hide from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor

from robustbench_lite.attacks.base import Attack
from robustbench_lite.attacks.iterative import Ascent, supports_steps
from robustbench_lite.core.goals import Goal
from robustbench_lite.core.losses import loss_named
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["FGSM"]


@dataclass(frozen=True)
class FGSM(Attack):
    """The fast gradient sign method.

    Attributes:
        step_size: length of the step in the units of the images; None: eps, or 1.25 eps after a random start.
        random_start: start uniformly in the ball instead of at the clean image.
        loss: "ce", "margin" or "dlr".
        density: for l1, the share of the coordinates that a step moves.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    step_size: float | str | None = None
    random_start: bool = False
    loss: str = "ce"
    density: float = 0.05

    def __post_init__(self) -> None:
        self.ascent()

    def ascent(self) -> Ascent:
        """Return the ascent that this attack runs."""
        return Ascent(loss_named(self.loss), 1, 1.25 if self.random_start else 1.0, self.step_size, self.density)

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is an linf, l2 or l1 ball with a budget."""
        return supports_steps(threat)

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Take one step."""
        rows = oracle.standing(oracle.gradient_cost)
        start = threat.take(rows).random_point(x[rows], streams.take(rows)) if self.random_start else x[rows]
        self.ascent()(oracle, cast(Lp, threat), rows, start)
        return oracle.best
