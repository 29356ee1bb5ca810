"""IBP training: minimise a proven upper bound of the worst-case loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.certify.bounds import bounds as output_bounds
from robustbench_lite.core.checks import parse_number
from robustbench_lite.core.threats import Lp
from robustbench_lite.defenses.base import Batch, Objective, Step
from robustbench_lite.defenses.ramps import check_ramp, ramp

if TYPE_CHECKING:
    from robustbench_lite.core.rng import Streams

__all__ = ["IBPTraining", "margins_specification", "worst_case_cross_entropy"]


def margins_specification(y: Tensor, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return C (B, K - 1, K) with rows e_j - e_y for the wrong classes j in their order: C z = z_j - z_y.

    >>> margins_specification(torch.tensor([1]), 3)
    tensor([[[ 1., -1.,  0.],
             [ 0., -1.,  1.]]])
    """
    unit = torch.eye(num_classes, device=y.device, dtype=dtype)
    wrong = unit.bool().logical_not()[y]  # (B, K), False at the label
    rows = unit.expand(len(y), -1, -1)[wrong].view(len(y), num_classes - 1, num_classes)
    return rows - unit[y].unsqueeze(1)


def worst_case_cross_entropy(upper: Tensor) -> Tensor:
    """Return the mean cross-entropy of the worst-case elided logits.

    Args:
        upper: (B, K - 1) upper bounds of z_j - z_y for the wrong classes. One zero, the true class's own margin,
            joins them (a second one would change the loss): log(1 + sum_j exp(upper_j)).
    """
    return F.pad(upper, (1, 0)).logsumexp(dim=1).mean()


@dataclass(frozen=True)
class IBPTraining(Objective):
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
        kappa: share of the clean loss in the end.
        warmup: share of the training with the clean loss alone.
        ramp: share of the training, after the warm-up, in which eps rises and kappa falls.
        bounds: range of the images.

    Raises:
        ValueError: eps not positive or wider than the image range, bounds in the wrong order, kappa outside [0, 1], or
            a ramp that does not fit.
    """

    eps: float | str
    kappa: float = 0.5
    warmup: float = 2_000 / 60_001
    ramp: float = 10_000 / 60_001
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_ramp(self.warmup, self.ramp)
        object.__setattr__(self, "bounds", Lp("linf", self.eps, self.bounds).bounds)
        if parse_number(self.eps) <= 0:
            raise ValueError(f"eps must be > 0, got {self.eps}; use StandardTraining for a clean net")
        if not 0 <= self.kappa <= 1:
            raise ValueError(f"kappa is the share of the clean loss, in [0, 1], got {self.kappa:g}")

    def loss(self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams) -> Tensor:
        """Return kappa * CE(z, y) + (1 - kappa) * CE(worst-case elided logits) at this step's eps and kappa."""
        share = ramp(step.progress, self.warmup, self.ramp)
        logits = model(batch.x).float()
        clean = F.cross_entropy(logits, batch.y)
        if share == 0:
            return clean
        kappa = 1 - share * (1 - self.kappa)
        specification = margins_specification(batch.y, logits.shape[1])
        worst = worst_case_cross_entropy(self.upper(model, batch.x, share, specification))
        return kappa * clean + (1 - kappa) * worst

    def upper(self, model: nn.Module, x: Tensor, share: float, specification: Tensor) -> Tensor:
        """Return upper bounds (B, rows of the specification) over the ball of `share` of eps around `x`."""
        eps = share * parse_number(self.eps)
        box = ((x - eps).clamp(*self.bounds), (x + eps).clamp(*self.bounds))
        return output_bounds(model, box, method="ibp", C=specification)[1].float()
