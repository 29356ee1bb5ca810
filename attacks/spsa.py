"""SPSA: Adam on gradients estimated by simultaneous perturbation.

Threat: linf. Access: scores.
Source: Uesato, O'Donoghue, van den Oord and Kohli 2018, "Adversarial Risk and the Dangers of Evaluating Against Weak
Attacks" (1802.05666): the margin loss, Adam, probes at distance 0.01.
Departures: 128 probes a step, as in CleverHans; the paper takes 8,192 against strong defenses, and so should you there
(`samples`). The step size is a third of eps, which at the paper's CIFAR-10 eps of 8/255 is its 0.01. Probes may be
drawn in a basis of low frequencies. Each sample leaves at its first success.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from robustbench_lite.attacks._climbing import ClimbingAttack
from robustbench_lite.attacks._nes_search import Adam
from robustbench_lite.attacks.basis import Basis, Pixels
from robustbench_lite.attacks.estimators import SPSAEstimator

__all__ = ["SPSA"]


@dataclass(frozen=True)
class SPSA(ClimbingAttack):
    """Adam on simultaneous-perturbation estimates.

    Attributes:
        samples: probes of one estimate, an even number: mirrored pairs.
        delta: distance of a probe along each coordinate, in the units of the images; the default is for bounds (0, 1).
        lr: Adam's step size, in the units of the images; None: `eps / 3`.
        queries: forward passes that each sample may spend, the clean check aside.
        loss: "margin", "ce" or "dlr".
        basis: where probes are drawn: `Pixels()`, `DCT(fraction)`, `Tiles(side)`.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf",)

    samples: int = 128
    delta: float | str = 0.01
    lr: float | str | None = None
    queries: int = 10_000
    loss: str = "margin"
    basis: Basis = field(default_factory=Pixels)

    def estimator(self) -> SPSAEstimator:
        """Return where gradients come from."""
        return SPSAEstimator(self.samples, self.delta, basis=self.basis)

    def steps(self) -> Adam:
        """Return the rule for steps."""
        return Adam(self.lr)
