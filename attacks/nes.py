"""NES: the query-limited black-box attack, sign steps along gradients estimated from scores.

Threat: linf, l2. Access: scores.
Source: Ilyas, Engstrom, Athalye and Lin 2018, "Black-box Adversarial Attacks with Limited Queries and Information"
(1804.08598), with the defaults of the authors' code; l2 steps as in Ilyas, Engstrom and Madry 2018, "Prior Convictions:
Black-Box Adversarial Attacks with Bandits and Priors" (1807.07978).
Departures: step sizes are shares of eps, which at the original's eps 0.05 are its 0.01 and 5e-5. The plateau rule looks
at the objective that is descended, with its sign: the authors' code compares the cross-entropy to the true class
itself when there is no target, and then cuts the step whenever the attack works. It looks at the loss of the point, not
at the mean over the probes, which differs in second order of sigma. Every forward counts, the check of success too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from robustbench_lite.attacks._climbing import ClimbingAttack
from robustbench_lite.attacks._nes_search import PlateauSteps
from robustbench_lite.attacks.basis import Basis, Pixels
from robustbench_lite.attacks.estimators import NESEstimator

__all__ = ["NES"]


@dataclass(frozen=True)
class NES(ClimbingAttack):
    """Ascent on gradients estimated by natural evolution strategies.

    Attributes:
        samples: probes of one estimate, an even number: mirrored pairs.
        sigma: standard deviation of the probes, in the units of the images; the default is for bounds (0, 1).
        lr: length of the first steps, in the units of the images; None: `eps / 5`.
        min_lr: length below which steps are not cut; None: `eps / 1000`.
        momentum: share of the old direction in the new one.
        plateau_length: losses in a window; when the newest is worse than the oldest, steps are cut.
        plateau_drop: what the length of the steps is then divided by.
        queries: forward passes that each sample may spend, the clean check aside.
        loss: "ce", "margin" or "dlr".
        basis: where probes are drawn: `Pixels()`, `DCT(fraction)`, `Tiles(side)`.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")

    samples: int = 50
    sigma: float | str = 1e-3
    lr: float | str | None = None
    min_lr: float | str | None = None
    momentum: float = 0.9
    plateau_length: int = 5
    plateau_drop: float = 2.0
    queries: int = 10_000
    loss: str = "ce"
    basis: Basis = field(default_factory=Pixels)

    def estimator(self) -> NESEstimator:
        """Return where gradients come from."""
        return NESEstimator(self.samples, self.sigma, basis=self.basis)

    def steps(self) -> PlateauSteps:
        """Return the rule for steps."""
        return PlateauSteps(self.lr, self.min_lr, self.momentum, self.plateau_length, self.plateau_drop)
