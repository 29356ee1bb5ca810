"""AutoAttack: the standard ensemble, each part on the samples that the ones before left standing.

Threat: linf, l2, l1. Access: gradients.
Source: Croce and Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks" (2003.01690); the l1 budgets are those of Croce and Hein 2021, "Mind the box" (2103.01208).
Departures: those of the parts (see APGD, FABT and Square). With few classes the parts have fewer targets, and with two
or three the ratio loss falls back on what is left of it, where the original stops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor

from robustbench_lite.attacks.apgd import APGD
from robustbench_lite.attacks.base import Attack
from robustbench_lite.attacks.fabt import FABT
from robustbench_lite.attacks.square import Square
from robustbench_lite.core.errors import lookup
from robustbench_lite.core.goals import Goal
from robustbench_lite.core.losses import margin
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["AutoAttack"]

NOISY = (APGD(loss="ce", eot=20), APGD(loss="dlr", eot=20))
BALLS = (APGD(loss="ce"), APGD(loss="dlr_targeted", target_classes=9), FABT(), Square())
SPARSE = (
    APGD(loss="ce", restarts=5, wide_start=True),
    APGD(loss="dlr_targeted", target_classes=5, wide_start=True),
    FABT(),
    Square(),
)
VARIANTS: dict[str, dict[str, tuple[Attack, ...]]] = {
    "standard": {"linf": BALLS, "l2": BALLS, "l1": SPARSE},
    "rand": {"linf": NOISY, "l2": NOISY, "l1": NOISY},
}


@dataclass(frozen=True)
class AutoAttack(Attack):
    """Auto-PGD on the cross-entropy, Auto-PGD and FAB towards nine targets each, and Square with 5,000 queries.

    Attributes:
        variant: "standard", or "rand" for randomised models: Auto-PGD on two losses with 20 gradients an iterate.

    Raises:
        ValueError: an unknown variant.
    """

    variant: str = "standard"

    def __post_init__(self) -> None:
        lookup(self.variant, VARIANTS, "variant")

    def parts(self, threat: Lp) -> list[Attack]:
        """Return the attacks of the ensemble that search this threat, in their order."""
        return list(VARIANTS[self.variant][threat.norm])

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is an linf, l2 or l1 ball with a budget."""
        return APGD().supports(threat)

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Run the parts, one after the other; what fails is ranked by its margin, whatever loss a part ascends."""
        oracle.measure = margin
        for number, part in enumerate(self.parts(cast(Lp, threat))):
            part.run(oracle, x, goal, threat, streams.fork(number))
        return oracle.best
