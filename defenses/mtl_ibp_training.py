"""MTL-IBP: a convex combination of the adversarial loss and of its interval bound."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.attacks.base import Attack
from robustbench_lite.attacks.pgd import PGD
from robustbench_lite.certify.bounds import bounds as output_bounds
from robustbench_lite.core.threats import Lp
from robustbench_lite.defenses.adversarial_training import AdversarialTraining
from robustbench_lite.defenses.base import Batch
from robustbench_lite.defenses.certified_training import (
    CertifiedTraining,
    margins_specification,
    worst_case_cross_entropy,
)

if TYPE_CHECKING:
    from robustbench_lite.core.rng import Streams

__all__ = ["MTLIBPTraining"]


@dataclass(frozen=True)
class MTLIBPTraining(CertifiedTraining):
    """Minimise (1 - alpha) * CE(f(x'), y) + alpha * CE(worst-case elided logits), x' the example of an attack.

    Between the adversarial loss, a lower bound of the worst case, and the interval loss, an upper one, lies the worst
    case itself; alpha says where in between to train, and trades what can be proven against accuracy. Where alpha is
    small, interval bounds prove little: certify with `Cascade`.

    Source: De Palma, Bunel, Dvijotham, Kumar, Stanforth, Lomuscio, "Expressive Losses for Verified Robustness via
    Convex Combinations", ICLR 2024, arXiv:2305.13991.
    Departures: the attack keeps the worst of its iterates and meets the net in eval mode. For the initialisation and
    regularisers that the original trains with, see `ShortSchedule`.

    Args:
        eps: linf radius of the training, a number or "8/255".
        warmup: share of the training with the clean loss alone.
        ramp: share of the training, after the warm-up, in which eps rises.
        bounds: range of the images.
        alpha: share of the interval loss; 0 is adversarial training, 1 IBP training without a clean loss.
        attack: what finds x', an attack on linf balls.

    Raises:
        ValueError: as `CertifiedTraining`, alpha outside [0, 1], or an attack that does not know linf balls.
    """

    alpha: float = 0.5
    attack: Attack = field(default_factory=lambda: PGD(steps=8))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is the share of the interval loss, in [0, 1], got {self.alpha:g}")
        self.search()  # which checks the attack

    def search(self) -> AdversarialTraining:
        """Return the adversarial training that finds the examples."""
        return AdversarialTraining(self.attack, Lp("linf", self.eps, self.bounds))

    def ramped(self, model: nn.Module, batch: Batch, share: float, streams: Streams) -> Tensor:
        """Return (1 - alpha) * CE(adversarial) + alpha * CE(worst-case elided logits) at this eps."""
        x = batch.x if self.alpha == 1 else self.search().examples(model, batch, share, streams)
        logits = model(x).float()  # at alpha = 1 for the sake of BatchNorm's statistics alone
        adversarial = F.cross_entropy(logits, batch.y)
        if self.alpha == 0:
            return adversarial
        specification = margins_specification(batch.y, logits.shape[1])
        upper = output_bounds(model, self.ball(batch.x, share), method="ibp", C=specification)[1]
        return (1 - self.alpha) * adversarial + self.alpha * worst_case_cross_entropy(upper)
