"""The common part of certified training: a ball that grows, the worst margins in it, and the loss they make."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.core.checks import parse_number
from robustbench_lite.core.threats import Lp
from robustbench_lite.defenses.base import Batch, Objective, Step
from robustbench_lite.defenses.ramps import check_ramp, ramp

if TYPE_CHECKING:
    from robustbench_lite.core.rng import Streams

__all__ = ["Box", "CertifiedTraining", "margins_specification", "worst_case_cross_entropy"]

Box = tuple[Tensor, Tensor]
"""Lower and upper ends, each (B, C, H, W)."""


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
class CertifiedTraining(Objective):
    """Training for proofs within an linf ball: the clean loss alone, then a ball that grows to `eps` and stays there.

    A subclass writes `ramped`, the loss once the ball has a size.

    Args:
        eps: linf radius that the training ends with, a number or "8/255".
        warmup: share of the training with the clean loss alone.
        ramp: share of the training, after the warm-up, in which the radius rises linearly from 0.
        bounds: range of the images.

    Raises:
        ValueError: eps not positive or wider than the image range, bounds in the wrong order, or a ramp that does not
            fit.
    """

    eps: float | str
    warmup: float = 2_000 / 60_001
    ramp: float = 10_000 / 60_001
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_ramp(self.warmup, self.ramp)
        object.__setattr__(self, "bounds", Lp("linf", self.eps, self.bounds).bounds)
        if parse_number(self.eps) <= 0:
            raise ValueError(f"eps must be > 0, got {self.eps}; use StandardTraining for a clean net")

    def loss(self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams) -> Tensor:
        """Return the clean loss during the warm-up, then that of `ramped`."""
        share = self.share(step)
        if share == 0:
            return F.cross_entropy(model(batch.x).float(), batch.y)
        return self.ramped(model, batch, share, streams)

    @abstractmethod
    def ramped(self, model: nn.Module, batch: Batch, share: float, streams: Streams) -> Tensor:
        """Return the loss of one batch, a scalar, where the radius is `share`, in (0, 1], of eps."""

    def share(self, step: Step) -> float:
        """Return the share of eps that the radius has come to, in [0, 1]."""
        return ramp(step.progress, self.warmup, self.ramp)

    def ball(self, x: Tensor, share: float) -> Box:
        """Return the ball of `share` of eps around images (B, C, H, W), cut by their range."""
        eps = share * parse_number(self.eps)
        return (x - eps).clamp(*self.bounds), (x + eps).clamp(*self.bounds)
