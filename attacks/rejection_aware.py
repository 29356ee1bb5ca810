"""The attack on a detector: wrong and accepted at once, by steps along whichever of the two fails.

Threat: linf, l2, l1, with a budget. Access: gradients, and the suspicion score of a `Rejecting` defense.
Source: the rule for attacks on detectors of Carlini et al. 2019, "On Evaluating Adversarial Robustness" (1902.06705):
success is an answer that is wrong and not rejected. Steps that follow one of two losses at a time are the selective
projected gradient descent of Bryniarski, Hingun, Pachuca, Wang and Carlini 2021, "Evading Adversarial Example Detection
Defenses with Orthogonal Projected Gradient Descent" (2106.15023).
Where the answer is not wrong yet, the sample steps up the margin; where it is, down the score. A weighted sum of both
would need a weight for each detector and sample.
Departures: runs towards each of the likeliest wrong classes, from random points of the ball, after an untargeted one
from the clean image; steps shrink along a cosine, so that the zigzag between the two constraints dies out; the
orthogonal form is left out, as it asks for two gradients a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from robustbench_lite.attacks._targets import likeliest_targets
from robustbench_lite.attacks._violations import Aim, Question, descend
from robustbench_lite.attacks.base import Attack
from robustbench_lite.attacks.iterative import supports_steps
from robustbench_lite.core.goals import Goal, Targeted
from robustbench_lite.core.insides import Rejecting
from robustbench_lite.core.losses import margin
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["RejectionAware"]

ANY = -1  # no class to head for


class _Answer(nn.Module):
    """Logits and score of a detector in one tensor (n, K + 1)."""

    def __init__(self, detector: Rejecting) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: Tensor) -> Tensor:
        logits, score = self.detector.answer(x)
        return torch.cat([logits, score.unsqueeze(1)], dim=1)


@dataclass(frozen=True)
class RejectionAware(Attack):
    """Selective projected gradient descent on margin and suspicion score.

    Attributes:
        steps: gradient steps of each run.
        step_size: first step as a share of eps; it falls to a hundredth along a cosine.
        restarts: rounds of runs: one without a class to head for, and one towards each target.
        targets: wrong classes to head for, the likeliest first; 0: none.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    needs: ClassVar[type | None] = Rejecting

    steps: int = 100
    step_size: float = 0.3
    restarts: int = 1
    targets: int = 9

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("restarts", 1), ("targets", 0)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"{name} must be a whole number, at least {least}, got {getattr(self, name)!r}")
        if not 0 < self.step_size <= 1:
            raise ValueError(f"step_size is a share of eps in (0, 1], got {self.step_size}")

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is an linf, l2 or l1 ball with a budget."""
        return isinstance(threat, Lp) and supports_steps(threat)

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Run towards any wrong class from the clean image, then towards each from random points."""
        ball, detector = cast(Lp, threat), oracle.inside(Rejecting)  # type: ignore[type-abstract]
        question = Question(_Answer(detector), lambda values, aim: _both(values, aim, detector.threshold), 2)
        first = True
        for heading in self._headings(oracle, x, goal):
            rows = oracle.standing(question.cost + oracle.judge_cost)
            if len(rows) == 0:
                break
            start = x[rows] if first else ball.take(rows).random_point(x[rows], streams.take(rows))
            own, none = goal.take(rows), x.new_zeros(len(rows), 0)
            aim = Aim(own.labels, own, heading[rows], none, none)
            rows, points = descend(oracle, ball, rows, start, aim, question, steps=self.steps, step_size=self.step_size)
            if len(rows):
                oracle.judge(points, rows)
            first = False
        return oracle.best

    def _headings(self, oracle: Oracle, x: Tensor, goal: Goal) -> list[Tensor]:
        """Return for each run the class that each sample of the batch heads for, int64 (B,)."""
        anywhere = torch.full_like(goal.labels, ANY)
        rows = oracle.standing(1)
        if isinstance(goal, Targeted) or self.targets == 0 or len(rows) == 0:
            return [anywhere] * self.restarts
        logits = oracle.scores(x[rows], rows, candidate=False)
        likeliest = likeliest_targets(logits, goal.labels[rows], self.targets)
        headings = [anywhere.index_copy(0, rows, classes) for classes in likeliest.unbind(dim=1)]
        return [anywhere, *headings] * self.restarts


def _right(logits: Tensor, aim: Goal) -> Tensor:
    """Return how far (n,) the answers are from wrong, or from the class to head for; negative beyond."""
    assert isinstance(aim, Aim)
    heading = aim.targets != ANY
    towards = margin(logits, Targeted(torch.where(heading, aim.targets, aim.labels)))
    return -torch.where(heading, towards, margin(logits, aim.goal))


def _both(values: Tensor, aim: Aim, threshold: Tensor) -> Tensor:
    """Return the two constraints (n, 2): not wrong, and over the threshold."""
    return torch.stack([_right(values[:, :-1], aim), values[:, -1] - threshold], dim=1)
