"""Projected gradient descent: the reference attack.

Threat: linf, l2, l1. Access: gradients.
Source: Madry, Makelov, Schmidt, Tsipras and Vladu 2017, "Towards Deep Learning Models Resistant to Adversarial
Attacks" (1706.06083); the sparse l1 step is that of SLIDE, Tramer and Boneh 2019 (1904.13000).
Departures: the default step is 2.5 eps / steps for every norm (the original's MNIST attack, 40 steps of 0.01 at
eps 0.3, is `PGD(steps=40, step_size=0.01)`); each sample keeps its best iterate and leaves at its first success, so
restarts cost only the samples that still stand; l1 steps skip coordinates at an image bound that point out of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from robustbench_lite.attacks.basis import Basis, Pixels
from robustbench_lite.attacks.iterative import Ascent, Autograd, Estimator, IterativeAttack
from robustbench_lite.core.losses import loss_named

__all__ = ["PGD"]


@dataclass(frozen=True)
class PGD(IterativeAttack):
    """Projected gradient descent with random starts and restarts.

    Attributes:
        steps: gradient steps in each run.
        step_size: length of a step in the units of the images; None: `2.5 * eps / steps`.
        restarts: runs from fresh random starts.
        random_start: start uniformly in the ball; False: at the clean image, which allows one run only.
        loss: "ce", "margin" or "dlr".
        density: for l1, the share of the coordinates that a step moves.
        estimator: where gradients come from: back-propagation, or queries (`attacks/estimators.py`).
        basis: the images that a step may use, such as low frequencies (`attacks/basis.py`).

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    steps: int = 40
    step_size: float | str | None = None
    restarts: int = 1
    random_start: bool = True
    loss: str = "ce"
    density: float = 0.05
    estimator: Estimator = field(default_factory=Autograd)
    basis: Basis = field(default_factory=Pixels)

    def ascent(self) -> Ascent:
        """Return the ascent of one run."""
        return Ascent(
            loss_named(self.loss),
            self.steps,
            path=2.5,
            step_size=self.step_size,
            density=self.density,
            restarts=self.restarts,
            random_start=self.random_start,
            estimator=self.estimator,
            basis=self.basis,
        )
