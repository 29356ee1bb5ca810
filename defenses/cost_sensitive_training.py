"""Cost-sensitive training: pay for proofs only against the mistakes that cost something."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.certify.bounds import bounds as output_bounds
from robustbench_lite.certify.cost_sensitive import CostSensitive, Matrix
from robustbench_lite.certify.ibp import IBP
from robustbench_lite.defenses.base import Batch, TrainingData
from robustbench_lite.defenses.certified_training import CertifiedTraining, margins_specification

if TYPE_CHECKING:
    from robustbench_lite.core.rng import Streams

__all__ = ["CostSensitiveTraining", "cost_sensitive_loss"]


@dataclass(frozen=True)
class CostSensitiveTraining(CertifiedTraining):
    """Minimise CE(z, y) + alpha * sum over seed classes k of mean_{y = k} log(1 + sum_j C_kj exp(f_j)).

    f_j is an interval bound of z_j - z_y over the ball; a seed class is one with a cost. With costs of 1 the inner term
    is the cross-entropy on worst-case elided logits, of the protected pairs alone; a cost c adds log c to its logit.
    What is not protected gets no proofs, and less robust than by uniform training: `certify.CostSensitive` certifies
    what costs something, and `certify.cost_report` prints the unprotected pairs beside it.

    Source: Zhang and Evans, "Cost-Sensitive Robustness against Adversarial Examples", ICLR 2019, arXiv:1810.09225.
    Departures: interval bounds in the place of Wong and Kolter's dual bound; eps rises from 0 (theirs on MNIST: 0.2
    from 0.05) after a warm-up, by shares of the training.

    Args:
        eps: linf radius of the training, a number or "8/255".
        warmup: share of the training with the clean loss alone.
        ramp: share of the training, after the warm-up, in which eps rises.
        bounds: range of the images.
        cost_matrix: C (K, K), entries >= 0 and 0 on the diagonal, at least one > 0, as nested sequences or a tensor;
            kept as tuples. `certify.seed_class_costs(9)` and `certify.small_large_costs()` are tasks of the original.
        alpha: weight of the robust term.

    Raises:
        ValueError: as `CertifiedTraining`, a cost matrix that is none or has no cost, alpha not positive; at `setup`, a
            matrix of another size than the number of classes.
    """

    cost_matrix: Matrix = ()
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        costs = CostSensitive(IBP(), self.cost_matrix).cost_matrix  # checked, as tuples
        object.__setattr__(self, "cost_matrix", costs)
        if not any(cost > 0 for row in costs for cost in row):
            raise ValueError("cost_matrix has no cost > 0, so there is nothing to protect; use StandardTraining")
        if not isinstance(self.alpha, (int, float)) or not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is the weight of the robust term, a number > 0 and finite, got {self.alpha!r}")

    def setup(self, model: nn.Module, data: TrainingData) -> None:
        """Check that the costs are about these classes; nothing is kept."""
        if len(self.cost_matrix) != data.num_classes:
            raise ValueError(
                f"cost_matrix is about {len(self.cost_matrix)} classes, but the data have {data.num_classes}"
            )

    def ramped(self, model: nn.Module, batch: Batch, share: float, streams: Streams) -> Tensor:
        """Return CE(z, y) + alpha * the robust term at this eps."""
        logits = model(batch.x).float()
        clean = F.cross_entropy(logits, batch.y)
        costs = torch.as_tensor(self.cost_matrix, dtype=logits.dtype, device=logits.device)
        seeds = (costs > 0).any(dim=1)[batch.y].nonzero().flatten()
        if len(seeds) == 0:
            return clean
        y = batch.y[seeds]
        box, specification = self.ball(batch.x[seeds], share), margins_specification(y, len(costs))
        upper = output_bounds(model, box, method="ibp", C=specification)[1]
        return clean + self.alpha * cost_sensitive_loss(upper, y, costs)


def cost_sensitive_loss(upper: Tensor, y: Tensor, costs: Tensor) -> Tensor:
    """Return the sum over classes k of the mean, over the samples of class k, of log(1 + sum_j C_kj exp(f_j)).

    Args:
        upper: (B, K - 1), upper bounds f of z_j - z_y for the wrong classes in their order.
        y: labels, int64 (B,).
        costs: C (K, K).

    >>> costs = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    >>> cost_sensitive_loss(torch.zeros(1, 1), torch.tensor([0]), costs).exp().item()
    3.0
    """
    others = ~torch.eye(len(costs), dtype=torch.bool, device=costs.device)
    weights = costs[y][others[y]].view_as(upper)
    each = F.pad(upper + weights.log(), (1, 0)).logsumexp(dim=1)  # log 0 = -inf: a pair without a cost drops out
    return (each / y.bincount(minlength=len(costs))[y]).sum()
