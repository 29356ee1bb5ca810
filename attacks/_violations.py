"""Steps along whichever constraint is violated: for attacks that want several things at once.

Constraints are functions of the image, satisfied where they are <= 0. Each sample steps down the first of its
constraints that is violated, so nobody has to weigh a margin against a suspicion score.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from robustbench_lite.core.goals import Goal, Untargeted
from robustbench_lite.core.models import forward_passes
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.threats import Lp

__all__ = ["Aim", "Question", "descend", "first_violated"]

DENSITY = 0.05  # of the coordinates of a step in l1, as in PGD


@dataclass(frozen=True, eq=False)
class Aim(Untargeted):
    """What the constraints of a sample are about, and a place where they are noted.

    Attributes:
        goal: what the attack is asked for.
        targets: classes to head for, int64 (n,).
        extra: whatever else the constraints need of each sample, (n, anything).
        notes: the constraints' values, (n, C), written while their gradients are asked for.
    """

    goal: Goal
    targets: Tensor
    extra: Tensor
    notes: Tensor

    def take(self, keep: Tensor | slice) -> Aim:
        """Return the aim of these rows; for a slice the notes share their memory with this one's."""
        return Aim(self.labels[keep], self.goal.take(keep), self.targets[keep], self.extra[keep], self.notes[keep])


@dataclass(frozen=True)
class Question:
    """One question to the oracle about probes, and the constraints that its answer tells.

    Attributes:
        through: what is asked, made of parts of the deployed model.
        constraints: from answers (n, anything) and an aim to values (n, C), satisfied where <= 0.
        count: C.
    """

    through: nn.Module
    constraints: Callable[[Tensor, Aim], Tensor]
    count: int

    @property
    def cost(self) -> int:
        """Forward passes of the question."""
        return forward_passes(self.through)

    def ask(
        self, oracle: Oracle, points: Tensor, rows: Tensor, aim: Aim, combine: Callable[[Tensor, Aim], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the constraints' values (n, C) at probes, and the gradient (n, ...) of what `combine` makes of them.

        `combine` maps values (n, C) and their aim to one number (n,) a sample.
        """
        noted = replace(aim, notes=points.new_full((len(rows), self.count), math.nan))

        def loss(answers: Tensor, part: Goal) -> Tensor:
            assert isinstance(part, Aim)
            values = self.constraints(answers, part)
            part.notes.copy_(values.detach())
            return combine(values, part)

        _, slope = oracle.gradient(points, rows, loss, noted, candidate=False, through=self.through)
        return noted.notes, slope


def first_violated(values: Tensor, aim: Aim) -> Tensor:
    """Return the first of the values (n, C) that is not <= 0, (n,); where all are, the last."""
    violated = ~(values.detach() <= 0)  # so written, NaN is a violation
    violated[:, -1] = True
    return values.gather(1, violated.int().argmax(dim=1, keepdim=True)).squeeze(1)


def descend(
    oracle: Oracle,
    threat: Lp,
    rows: Tensor,
    points: Tensor,
    aim: Aim,
    question: Question,
    *,
    steps: int,
    step_size: float,
) -> tuple[Tensor, Tensor]:
    """Walk from `points` (n, C, H, W) for `rows` of the batch; judge points where all constraints hold.

    Steps go along the threat's steepest direction (in l1 evenly along the steepest twentieth of the coordinates), the
    first `step_size` times eps long; they shrink to a hundredth along a cosine.

    Args:
        oracle: keeps what is found.
        threat: the ball of the whole batch.
        rows: int64 (n,).
        points: where to start.
        aim: that of `rows`.
        question: tells the constraints.
        steps: gradient steps.
        step_size: share of eps, in (0, 1].

    Returns:
        Rows that still search, and their last points; neither was judged for that.
    """
    need = question.cost + oracle.judge_cost
    ball, project = threat.take(rows), threat.take(rows).projector(oracle.x[rows])
    for step in range(steps):
        keep = oracle.still(rows, need)
        if len(keep) < len(rows):
            rows, points, aim = rows[keep], points[keep], aim.take(keep)
            ball, project = ball.take(keep), project.take(keep)
        if len(rows) == 0:
            break
        values, slope = question.ask(oracle, points, rows, aim, first_violated)
        held = (values <= 0).all(dim=1).nonzero().flatten()
        if len(held):
            oracle.judge(points[held], rows[held])
        share = step_size * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)
        points = project(points + share * ball.radius(points) * ball.steepest(-slope, DENSITY, at=points))
    return rows, points
