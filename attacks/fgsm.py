"""The fast gradient sign method: one step to the edge of the threat.

Threat: linf, l2, l1. Access: gradients.
Source: Goodfellow, Shlens and Szegedy 2014, "Explaining and Harnessing Adversarial Examples" (1412.6572); the random
start followed by a longer step is that of Wong, Rice and Kolter 2020 (2001.03994).
Departures: other norms take the norm's steepest step. Useful for training and as a sanity check; never evidence of
robustness, since nets trained against it can hide from it.
"""

from __future__ import annotations

from dataclasses import dataclass

from robustbench_lite.attacks.iterative import Ascent, IterativeAttack
from robustbench_lite.core.losses import loss_named

__all__ = ["FGSM"]


@dataclass(frozen=True)
class FGSM(IterativeAttack):
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

    def ascent(self) -> Ascent:
        """Return the ascent that this attack runs: one step."""
        return Ascent(
            loss_named(self.loss),
            steps=1,
            path=1.25 if self.random_start else 1.0,
            step_size=self.step_size,
            density=self.density,
            random_start=self.random_start,
        )
