"""The self-test: planted masks must be flagged by an evaluation that does not adapt, and fall to one that does."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from robustbench_lite.attacks import PGD, Square
from robustbench_lite.core.threats import Lp
from robustbench_lite.data.base import Dataset
from robustbench_lite.evaluation.harness import evaluate
from robustbench_lite.evaluation.masks import MASKS, Naive

__all__ = ["BROKEN", "Outcome", "selftest"]

BROKEN = 0.05  # an adaptive evaluation must leave less than this share standing
NAIVE = (PGD(steps=20),)
ADAPTIVE = (PGD(steps=100, restarts=2, loss="margin"), Square(queries=1000))


@dataclass(frozen=True)
class Outcome:
    """What two evaluations say of a mask.

    Attributes:
        mask: its name.
        clean: accuracy on clean images.
        naive: accuracy under PGD with 20 steps on the cross-entropy, which knows nothing of the mask.
        flags: ids of the flags that this evaluation raises.
        adaptive: accuracy under attacks on what is behind the mask.
    """

    mask: str
    clean: float
    naive: float
    flags: tuple[str, ...]
    adaptive: float

    @property
    def passed(self) -> bool:
        """Whether the mask was flagged, and broken."""
        return bool(self.flags) and self.adaptive < BROKEN


def selftest(net: nn.Module, data: Dataset, threat: Lp, mask: str, *, seed: int = 0) -> Outcome:
    """Evaluate a net behind a mask twice: as one who knows nothing of it would, and adapted to it.

    Args:
        net: an undefended net, in eval mode.
        data: samples; some dozens will do.
        threat: a ball in which the net without the mask has next to no accuracy.
        mask: its name in `MASKS`.
        seed: of all randomness.

    Raises:
        KeyError: no such mask.
    """
    masked = MASKS[mask](net).eval()
    naive = evaluate(Naive(masked).eval(), data, threat, NAIVE, probed=True, seed=seed, name=mask)
    adapted = evaluate(masked, data, threat, ADAPTIVE, seed=seed, name=mask, mode="cascade").summary().iloc[0]
    row, flags = naive.summary().iloc[0], dict.fromkeys(flag.id for flag in naive.flags)
    return Outcome(mask, float(row["clean"]), float(row["worst_case"]), tuple(flags), float(adapted["worst_case"]))
