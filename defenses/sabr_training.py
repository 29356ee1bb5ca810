"""SABR: interval bounds of a small box, put where an attack finds the loss high."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from robustbench_lite.attacks.base import Attack
from robustbench_lite.attacks.pgd import PGD
from robustbench_lite.core.checks import parse_number
from robustbench_lite.core.threats import Lp
from robustbench_lite.defenses.adversarial_training import AdversarialTraining
from robustbench_lite.defenses.base import Batch
from robustbench_lite.defenses.certified_training import Box
from robustbench_lite.defenses.ibp_training import IBPTraining

if TYPE_CHECKING:
    from robustbench_lite.core.rng import Streams

__all__ = ["SABRTraining"]


@dataclass(frozen=True)
class SABRTraining(IBPTraining):
    """Minimise the interval bound of the loss over a box of radius lambda * eps around an adversarial example.

    The example is sought in the ball of radius (1 - lambda) * eps, so the box lies in the ball; it is cut by the ball
    and by the images' range. The loss bounds the worst case of the box, not that of the ball: an estimate between
    adversarial training (lambda = 0) and IBP training (lambda = 1), and far less regularising than the latter. So the
    nets are more accurate, but interval bounds prove little of it where lambda is small: certify with `Cascade`.

    Source: Mueller, Eckert, Fischer, Vechev, "Certified Training: Small Boxes are All You Need", ICLR 2023,
    arXiv:2210.04871.
    Departures: an optional share of the clean loss (the original has none: kappa = 0), of which there is more while eps
    rises; the attack keeps the worst of its iterates. For the initialisation and regularisers that the original trains
    with, see `ShortSchedule`.

    Args:
        eps: linf radius of the training, a number or "8/255".
        warmup: share of the training with the clean loss alone.
        ramp: share of the training, after the warm-up, in which eps rises and kappa falls.
        bounds: range of the images.
        kappa: share of the clean loss in the end.
        subselection: lambda in (0, 1], the radius of the box as a share of eps.
        attack: what finds the centre of the box, an attack on linf balls.

    Raises:
        ValueError: as `IBPTraining`, a lambda outside (0, 1], or an attack that does not know linf balls.
    """

    kappa: float = 0.0
    subselection: float = 0.4
    attack: Attack = field(default_factory=lambda: PGD(steps=8))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.subselection <= 1:
            raise ValueError(
                f"subselection is the box's share of eps, in (0, 1], got {self.subselection:g}; "
                "for 0 use AdversarialTraining"
            )
        self.search()  # which checks the attack

    def search(self) -> AdversarialTraining:
        """Return the adversarial training whose examples are the centres of the boxes."""
        radius = (1 - self.subselection) * parse_number(self.eps)
        return AdversarialTraining(self.attack, Lp("linf", radius, self.bounds))

    def box(self, model: nn.Module, batch: Batch, share: float, streams: Streams) -> Box:
        """Return the box of radius lambda * `share` * eps around adversarial examples, within the ball."""
        low, high = self.ball(batch.x, share)
        if self.subselection == 1:
            return low, high
        centre = self.search().examples(model, batch, share, streams)
        radius = self.subselection * share * parse_number(self.eps)
        return (centre - radius).clamp(low, high), (centre + radius).clamp(low, high)
