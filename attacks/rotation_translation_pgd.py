"""Projected gradient ascent on rotations and translations: what the grid is compared with.

Threat: rotations with translations. Access: gradients.
Source: the first-order attack of Engstrom, Tran, Tsipras, Schmidt and Madry 2017 (1712.02779), who find that it loses
to the grid: the loss has many local maxima in the three parameters. With as many forward passes spent on restarts it
draws level on small MNIST nets (`benchmarks/spatial.py`), at twice the cost of a pass.
Departures: signs of the gradient with momentum, each parameter in shares of its budget; restarts from random points.
"""

from __future__ import annotations

from dataclasses import dataclass

from robustbench_lite.attacks._parametric_ascent import ParametricAscent
from robustbench_lite.core.spatial import RotationTranslation
from robustbench_lite.core.threats import Threat

__all__ = ["RotationTranslationPGD"]


@dataclass(frozen=True)
class RotationTranslationPGD(ParametricAscent):
    """Ascend the loss over angle and shifts; each step moves each of them by the same share of its budget.

    Attributes:
        steps: gradient steps in each run.
        step_size: length of a step as a share of the budget; None: `5 / steps`.
        restarts: runs from fresh random parameters, each on the samples that still stand.
        loss: "ce", "margin" or "dlr".
        momentum: share of the last direction that is kept; gradients, each over its l1 norm, add up to it.

    Raises:
        ValueError: a setting out of range.
    """

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is one of rotations and translations."""
        return isinstance(threat, RotationTranslation)
