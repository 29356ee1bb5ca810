"""What an attacker wants: any wrong label, or a given one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robustbench_lite.core.models import ABSTAIN

__all__ = ["Goal", "Targeted", "Untargeted", "as_goal"]


@dataclass(frozen=True, eq=False)
class Untargeted:
    """Make the prediction differ from `labels`, int64 (B,)."""

    labels: Tensor

    def achieved(self, prediction: Tensor, rejects: bool = False) -> Tensor:
        """Return bool (B,): the answer is wrong. A detector's refusal (`rejects`) is no success; an abstention is."""
        wrong = prediction != self.labels
        return wrong & (prediction != ABSTAIN) if rejects else wrong

    def take(self, keep: Tensor | slice) -> Untargeted:
        """Return the goal of these rows."""
        return Untargeted(self.labels[keep])


@dataclass(frozen=True, eq=False)
class Targeted:
    """Make the prediction equal to `labels`, int64 (B,)."""

    labels: Tensor

    def achieved(self, prediction: Tensor, rejects: bool = False) -> Tensor:
        """Return bool (B,): the answer is the target, which is never `ABSTAIN`: `rejects` changes nothing."""
        return prediction == self.labels

    def take(self, keep: Tensor | slice) -> Targeted:
        """Return the goal of these rows."""
        return Targeted(self.labels[keep])


Goal = Untargeted | Targeted


def as_goal(goal: Goal | Tensor) -> Goal:
    """Return `goal` itself, or `Untargeted(goal)` for a label tensor.

    Raises:
        TypeError: neither a goal nor a tensor.
    """
    if isinstance(goal, Tensor):
        return Untargeted(goal)
    if not isinstance(goal, Untargeted | Targeted):
        raise TypeError(f"a goal is Untargeted(y), Targeted(t) or a label tensor, got {type(goal).__name__}")
    return goal
