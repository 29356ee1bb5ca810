"""IBP training: minimise a proven upper bound of the worst-case loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.certify.bounds import bounds as output_bounds
from robustbench_lite.defenses.base import Batch
from robustbench_lite.defenses.certified_training import (
    Box,
    CertifiedTraining,
    margins_specification,
    worst_case_cross_entropy,
)

if TYPE_CHECKING:
    from robustbench_lite.core.rng import Streams

__all__ = ["IBPTraining"]


@dataclass(frozen=True)
class IBPTraining(CertifiedTraining):
    """Minimise kappa * CE(z, y) + (1 - kappa) * CE(worst-case elided logits within eps).

    The bounds are interval bounds of the linf ball, cut by the images' range, with the last layer elided (bounded as
    z_j - z_y). Warm-up on the clean loss alone; then eps rises from 0 to `eps` and kappa falls from 1 to `kappa`,
    both linearly; then both stay. A net trained so is certified by `certify.IBP`; its bounds are loose elsewhere.

    Source: Gowal, Dvijotham, Stanforth, Bunel, Qin, Uesato, Arandjelovic, Mann, Kohli, "On the Effectiveness of
    Interval Bound Propagation for Training Verifiably Robust Models", 2018, arXiv:1810.12715.
    Departure: shares of the training instead of numbers of steps; the defaults are Gowal's 2,000 warm-up and 10,000
    ramp steps out of 60,001. BatchNorm, which their nets lack, enters the bounds with its running statistics.

    Args:
        eps: linf radius of the training, a number or "8/255"; Gowal trains at 0.33 for a target of 0.3.
        warmup: share of the training with the clean loss alone.
        ramp: share of the training, after the warm-up, in which eps rises and kappa falls.
        bounds: range of the images.
        kappa: share of the clean loss in the end.

    Raises:
        ValueError: eps not positive or wider than the image range, bounds in the wrong order, kappa outside [0, 1], or
            a ramp that does not fit.
    """

    kappa: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.kappa <= 1:
            raise ValueError(f"kappa is the share of the clean loss, in [0, 1], got {self.kappa:g}")

    def ramped(self, model: nn.Module, batch: Batch, share: float, streams: Streams) -> Tensor:
        """Return kappa * CE(z, y) + (1 - kappa) * CE(worst-case elided logits) at this eps and kappa."""
        kappa = 1 - share * (1 - self.kappa)
        logits = model(batch.x).float()
        box = self.box(model, batch, share, streams)
        upper = self.upper(model, box, margins_specification(batch.y, logits.shape[1]), share)
        return kappa * F.cross_entropy(logits, batch.y) + (1 - kappa) * worst_case_cross_entropy(upper)

    def box(self, model: nn.Module, batch: Batch, share: float, streams: Streams) -> Box:
        """Return the box of images that the loss is bounded over: here the whole ball of `share` of eps."""
        return self.ball(batch.x, share)

    def upper(self, model: nn.Module, box: Box, specification: Tensor, share: float) -> Tensor:
        """Return upper bounds (B, rows of the specification) over the box: here interval bounds, whatever the share."""
        return output_bounds(model, box, method="ibp", C=specification)[1]
