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
from typing import cast

from torch import Tensor

from robustbench_lite.attacks._nes_search import Adam, check_queries, climb
from robustbench_lite.attacks.base import Attack
from robustbench_lite.attacks.basis import Basis, Pixels
from robustbench_lite.attacks.estimators import SPSAEstimator
from robustbench_lite.core.goals import Goal
from robustbench_lite.core.losses import loss_named
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["SPSA"]


@dataclass(frozen=True)
class SPSA(Attack):
    """Adam on simultaneous-perturbation estimates.

    Attributes:
        samples: probes of one estimate, an even number: mirrored pairs.
        delta: distance of a probe along each coordinate, in the units of the images.
        lr: Adam's step size, in the units of the images; None: `eps / 3`.
        queries: forward passes that each sample may spend, the clean check aside.
        loss: "margin", "ce" or "dlr".
        basis: where probes are drawn: `Pixels()`, `DCT(fraction)`, `Tiles(side)`.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    samples: int = 128
    delta: float | str = 0.01
    lr: float | str | None = None
    queries: int = 10_000
    loss: str = "margin"
    basis: Basis = field(default_factory=Pixels)

    def __post_init__(self) -> None:
        self.estimator()
        Adam(self.lr)
        loss_named(self.loss)
        check_queries(self.queries)

    @property
    def access(self) -> Access:
        """Scores are enough."""
        return Access.SCORES

    def estimator(self) -> SPSAEstimator:
        """Return where gradients come from."""
        return SPSAEstimator(self.samples, self.delta, basis=self.basis)

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is an linf ball with a budget."""
        return isinstance(threat, Lp) and threat.norm == "linf" and threat.eps is not None

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Climb from the clean images."""
        climb(
            oracle,
            cast(Lp, threat),
            streams,
            loss=loss_named(self.loss),
            estimator=self.estimator(),
            update=Adam(self.lr),
            queries=self.queries,
        )
        return oracle.best
