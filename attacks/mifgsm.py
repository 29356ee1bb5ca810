"""The momentum iterative method: steps along gradients that add up.

Threat: linf, l2, l1. Access: gradients.
Source: Dong, Liao, Pang, Su, Zhu, Hu and Li 2017, "Boosting Adversarial Attacks with Momentum" (1710.06081).
Departures: none in the step, with each gradient over its l1 norm and steps of eps / steps; other norms take the norm's
steepest step along the sum. Each sample keeps its best iterate and leaves at its first success.
"""

from __future__ import annotations

from dataclasses import dataclass

from robustbench_lite.attacks.iterative import Ascent, IterativeAttack
from robustbench_lite.core.losses import loss_named

__all__ = ["MIFGSM"]


@dataclass(frozen=True)
class MIFGSM(IterativeAttack):
    """The momentum iterative fast gradient sign method.

    Attributes:
        steps: gradient steps.
        step_size: length of a step in the units of the images; None: `eps / steps`.
        momentum: the share of the last direction that is kept.
        loss: "ce", "margin" or "dlr".
        density: for l1, the share of the coordinates that a step moves.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    steps: int = 10
    step_size: float | str | None = None
    momentum: float = 1.0
    loss: str = "ce"
    density: float = 0.05

    def ascent(self) -> Ascent:
        """Return the ascent that this attack runs."""
        return Ascent(
            loss_named(self.loss), self.steps, 1.0, self.step_size, density=self.density, momentum=self.momentum
        )
