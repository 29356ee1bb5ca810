"""The basic iterative method: small sign steps from the clean image.

Threat: linf, l2, l1. Access: gradients.
Source: Kurakin, Goodfellow and Bengio 2016, "Adversarial examples in the physical world" (1607.02533).
Departures: the default step is 1.25 eps / steps; at 10 steps and eps 8/255 that is the original's 1/255. Other norms
take the norm's steepest step. Each sample keeps its best iterate and leaves at its first success.
"""

from __future__ import annotations

from dataclasses import dataclass

from robustbench_lite.attacks.iterative import Ascent, IterativeAttack
from robustbench_lite.core.losses import loss_named

__all__ = ["BIM"]


@dataclass(frozen=True)
class BIM(IterativeAttack):
    """The basic iterative method.

    Attributes:
        steps: gradient steps.
        step_size: length of a step in the units of the images; None: `1.25 * eps / steps`.
        loss: "ce", "margin" or "dlr".
        density: for l1, the share of the coordinates that a step moves.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    steps: int = 10
    step_size: float | str | None = None
    loss: str = "ce"
    density: float = 0.05

    def ascent(self) -> Ascent:
        """Return the ascent that this attack runs."""
        return Ascent(loss_named(self.loss), self.steps, 1.25, self.step_size, self.density)
