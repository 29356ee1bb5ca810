"""Losses towards a class of the attacker's choice, for goals that only ask for a wrong answer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robustbench_lite.core.goals import Goal, Targeted, Untargeted
from robustbench_lite.core.losses import Loss, cross_entropy, dlr, margin, relative_to_spread

__all__ = ["LOSSES", "Towards", "likeliest_targets", "ratio"]


@dataclass(frozen=True, eq=False)
class Towards(Untargeted):
    """Any answer but `labels` will do; the loss heads for `targets`, int64 (B,)."""

    targets: Tensor

    def take(self, keep: Tensor | slice) -> Towards:
        """Return the goal of these rows."""
        return Towards(self.labels[keep], self.targets[keep])


def likeliest_targets(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """Return the `count` classes (fewer where there are not as many) with the largest logits but the label, (B, T)."""
    others = logits.scatter(1, labels.unsqueeze(1), float("-inf")).argsort(dim=1, descending=True, stable=True)
    return others[:, : min(count, logits.shape[1] - 1)]


def ce(logits: Tensor, goal: Goal) -> Tensor:
    """Cross-entropy to the label, or minus that to the target."""
    return cross_entropy(logits, Targeted(goal.targets) if isinstance(goal, Towards) else goal)


def difference(logits: Tensor, goal: Goal) -> Tensor:
    """Logit margin; with a target to head for, z_t - z_y."""
    if not isinstance(goal, Towards):
        return margin(logits, goal)
    return (logits.gather(1, goal.targets.unsqueeze(1)) - logits.gather(1, goal.labels.unsqueeze(1))).squeeze(1)


def ratio(logits: Tensor, goal: Goal) -> Tensor:
    """Difference of logits ratio; with a target to head for, z_t - z_y over the spread of the four largest logits."""
    if not isinstance(goal, Towards):
        return dlr(logits, goal)
    return relative_to_spread(difference(logits, goal), logits, 4)


LOSSES: dict[str, Loss] = {"ce": ce, "margin": difference, "dlr": ratio}
