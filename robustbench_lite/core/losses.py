"""Attack losses: functions of logits (B, K) and a goal, to be maximised, one value (B,) a sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_lite.core.errors import lookup
from robustbench_lite.core.goals import Goal, Targeted

Loss = Callable[[Tensor, Goal], Tensor]

__all__ = ["LOSSES", "Loss", "cross_entropy", "dlr", "loss_named", "margin"]


def cross_entropy(logits: Tensor, goal: Goal) -> Tensor:
    """Cross-entropy to the true label, or minus the cross-entropy to the target."""
    value = F.cross_entropy(logits, goal.labels, reduction="none")
    return -value if isinstance(goal, Targeted) else value


def margin(logits: Tensor, goal: Goal) -> Tensor:
    """Logit margin: max_{j != y} z_j - z_y, or z_t - max_{j != t} z_j. Positive exactly where the goal is achieved.

    Carlini and Wagner 2017 (1608.04644), f_6 without its kappa. The best other logit is read by a mask, so the
    gradient reaches exactly two logits.

    Raises:
        ValueError: fewer than two classes.
    """
    chosen, other = _chosen_and_best_other(logits, goal.labels)
    return chosen - other if isinstance(goal, Targeted) else other - chosen


def dlr(logits: Tensor, goal: Goal) -> Tensor:
    """Difference of logits ratio, unchanged by scale and shift of the logits (Croce and Hein 2020, 2003.01690).

    Untargeted: (max_{j != y} z_j - z_y) / (z_(1) - z_(3)), logits sorted in descending order. Targeted:
    (z_t - max_{j != t} z_j) / (z_(1) - (z_(3) + z_(4)) / 2); the original's numerator z_t - z_y needs the true label,
    which a targeted goal does not name.

    Raises:
        ValueError: fewer than 3 classes (untargeted) or 4 (targeted); the margin loss has no such limit.
    """
    needed = 4 if isinstance(goal, Targeted) else 3
    if logits.shape[1] < needed:
        raise ValueError(f"DLR needs at least {needed} classes here, got {logits.shape[1]}: use the margin loss")
    top = logits.topk(needed, dim=1).values
    floor = (top[:, 2] + top[:, 3]) / 2 if isinstance(goal, Targeted) else top[:, 2]
    return margin(logits, goal) / (top[:, 0] - floor + 1e-12)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}


def loss_named(loss: str | Loss) -> Loss:
    """Return a loss by its name in `LOSSES`, or the function itself."""
    return lookup(loss, LOSSES, "loss") if isinstance(loss, str) else loss


def _chosen_and_best_other(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if logits.shape[1] < 2:
        raise ValueError(f"a margin needs at least 2 classes, got {logits.shape[1]}")
    column = labels.unsqueeze(1)
    chosen = logits.gather(1, column).squeeze(1)
    # An index, not amax: amax spreads the gradient evenly over ties.
    best = logits.detach().scatter(1, column, -torch.inf).argmax(dim=1, keepdim=True)
    return chosen, logits.gather(1, best).squeeze(1)
