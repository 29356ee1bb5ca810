"""Projected gradient descent: the reference attack.

Threat: linf, l2, l1. Access: gradients.
Source: Madry, Makelov, Schmidt, Tsipras and Vladu 2017, "Towards Deep Learning Models Resistant to Adversarial
Attacks" (1706.06083); the sparse l1 step is that of SLIDE, Tramer and Boneh 2019 (1904.13000).
Departures: the default step is 2.5 eps / steps for every norm (the original's MNIST attack, 40 steps of 0.01 at
eps 0.3, is `PGD(steps=40, step_size=0.01)`); each sample keeps its best iterate and leaves at its first success, so
restarts cost only the samples that still stand; l1 steps skip coordinates at an image bound that point out of it.
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

__all__ = ["PGD"]


@dataclass(frozen=True)
class PGD(Attack):
    """Projected gradient descent with random starts and restarts.

    Attributes:
        steps: gradient steps in each run.
        step_size: length of a step in the units of the images; None: `2.5 * eps / steps`.
        restarts: runs from fresh random starts.
        random_start: start uniformly in the ball; False: at the clean image, which allows one run only.
        loss: "ce", "margin" or "dlr".
        density: for l1, the share of the coordinates that a step moves.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    steps: int = 40
    step_size: float | str | None = None
    restarts: int = 1
    random_start: bool = True
    loss: str = "ce"
    density: float = 0.05

    def __post_init__(self) -> None:
        self.ascent()
        if not isinstance(self.restarts, int) or self.restarts < 1:
            raise ValueError(f"restarts must be a whole number, at least 1, got {self.restarts!r}")
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"{self.restarts} restarts from the clean image would all be the same: use random_start")

    def ascent(self) -> Ascent:
        """Return the ascent of one run."""
        return Ascent(loss_named(self.loss), self.steps, 2.5, self.step_size, self.density)

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is an linf, l2 or l1 ball with a budget."""
        return supports_steps(threat)

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Run `restarts` ascents, each on the samples that still stand."""
        ascent = self.ascent()
        for _ in range(self.restarts):
            rows = oracle.standing(oracle.gradient_cost)
            start = threat.take(rows).random_point(x[rows], streams.take(rows)) if self.random_start else x[rows]
            ascent(oracle, cast(Lp, threat), rows, start)
        return oracle.best
