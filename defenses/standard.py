"""Standard training: the undefended baseline that every table needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.defenses.base import Batch, Objective, Step

if TYPE_CHECKING:
    from robustbench_lite.core.rng import Streams

__all__ = ["StandardTraining"]


@dataclass(frozen=True)
class StandardTraining(Objective):
    """Cross-entropy on clean images. No robustness is claimed against anything."""

    def loss(self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams) -> Tensor:
        """Return the mean cross-entropy of the batch."""
        return F.cross_entropy(model(batch.x).float(), batch.y)
