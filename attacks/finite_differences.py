"""Finite differences: projected gradient descent on gradients measured coordinate by coordinate.

Threat: linf, l2, l1. Access: scores.
Source: the coordinate-wise gradient of Chen, Zhang, Sharma, Yi and Hsieh 2017, "ZOO: Zeroth Order Optimization based
Black-box Attacks" (1708.03999), in the steps of PGD (1706.06083).
Departures: steepest steps in a ball instead of ZOO's coordinate-wise Adam on a penalty; its random batches of
coordinates are `coordinates=128`, h 1e-4 on both sides. One-sided by default, and ten steps, for one gradient costs a
query for each coordinate. On quantised or noisy models only a large h (0.1 and more) measures anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from robustbench_lite.attacks.basis import Basis, Pixels
from robustbench_lite.attacks.estimators import FiniteDifferenceEstimator
from robustbench_lite.attacks.iterative import Ascent, IterativeAttack
from robustbench_lite.core.losses import loss_named

__all__ = ["FiniteDifferences"]


@dataclass(frozen=True)
class FiniteDifferences(IterativeAttack):
    """Steepest ascent from the clean image on finite-difference gradients.

    Attributes:
        steps: gradient steps.
        step_size: length of a step in the units of the images; None: `2.5 * eps / steps`.
        h: distance of a probe, in the units of the images; the default is for bounds (0, 1).
        two_sided: probe on both sides of the point.
        coordinates: coordinates of one gradient, drawn anew for each sample and step; None: all.
        loss: "margin", "ce" or "dlr"; float32 differences of a saturated cross-entropy are noise.
        density: for l1, the share of the coordinates that a step moves.
        basis: the coordinates: `Pixels()`, or far fewer with `DCT(fraction)` or `Tiles(side)`.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    steps: int = 10
    step_size: float | str | None = None
    h: float | str = 1e-3
    two_sided: bool = False
    coordinates: int | None = None
    loss: str = "margin"
    density: float = 0.05
    basis: Basis = field(default_factory=Pixels)

    def ascent(self) -> Ascent:
        """Return the ascent that this attack runs."""
        return Ascent(
            loss_named(self.loss),
            self.steps,
            path=2.5,
            step_size=self.step_size,
            density=self.density,
            estimator=FiniteDifferenceEstimator(self.h, self.two_sided, self.coordinates, basis=self.basis),
        )
