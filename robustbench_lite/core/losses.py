"""Attack losses: functions of logits (B, K) and a goal, to be maximised, one value (B,) a sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_lite.core.errors import lookup
from robustbench_lite.core.goals import Goal, Targeted

Loss = Callable[[Tensor, Goal], Tensor]

__all__ = ["LOSSES", "Loss", "cross_entropy", "dlr", "loss_named", "margin", "relative_to_spread"]


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
    which a targeted goal does not name. Departure: with fewer classes than that, where the original crashes, see
    `relative_to_spread`.

    Raises:
        ValueError: fewer than two classes.
    """
    return relative_to_spread(margin(logits, goal), logits, 4 if isinstance(goal, Targeted) else 3)


def relative_to_spread(difference: Tensor, logits: Tensor, largest: int) -> Tensor:
    """Divide (B,) by the spread of the `largest` logits: 3, z_(1) - z_(3), or 4, z_(1) - (z_(3) + z_(4)) / 2.

    With three classes the spread is z_(1) - z_(3) in both cases; with two there is nothing to compare with, and the
    difference is returned as it is (the ratio's gradient would be 0 everywhere).
    """
    top = logits.topk(min(logits.shape[1], largest), dim=1).values
    if top.shape[1] < 3:
        return difference
    floor = top[:, 2] if top.shape[1] == 3 else (top[:, 2] + top[:, 3]) / 2
    return difference / (top[:, 0] - floor + 1e-12)


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
