"""One run of Auto-PGD on one batch: evaluate, remember the best, restart from it where the rule says so, move."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_lite.attacks._apgd_rules import Rule
from robustbench_lite.core.goals import Goal
from robustbench_lite.core.losses import Loss
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rows import pick

__all__ = ["Climb"]


@dataclass
class Climb:
    """The state of a run; samples that have fallen, or cannot pay, leave on the way.

    Attributes:
        oracle: answers questions, and keeps what is found.
        rows: int64 (n,) the samples' rows.
        aim: the goal that the loss sees.
        points: (n, C, H, W) where they are.
        rule: how they move.
        loss: the function to ascend.
        eot: gradients averaged at each iterate.
        candidate: whether the points may be the answer.
        best: (n, C, H, W) the points with the highest loss of this run, once it has begun.
    """

    oracle: Oracle
    rows: Tensor
    aim: Goal
    points: Tensor
    rule: Rule
    loss: Loss
    eot: int = 1
    candidate: bool = True

    def __post_init__(self) -> None:
        like = self.points
        self.best, self._best_gradient = like, torch.zeros_like(like)
        self._best_value = torch.full((len(like),), -torch.inf, dtype=like.dtype, device=like.device)
        self._value = self._best_value  # the loss where the last step came from

    def run(self, steps: int) -> None:
        """Take `steps` steps, and evaluate the points they lead to."""
        for step in range(steps):
            if step % self.oracle.compact_every == 0:
                self._keep(self.oracle.still(self.rows, self.eot * self.oracle.gradient_cost))
            if len(self.rows) == 0:
                return
            value, gradient = self._ask()
            rose = value > self._value if step else None
            self._remember(value, gradient)
            restart = self.rule.look(step, rose, self._best_value, self.best)
            if restart is not None:
                self.points = pick(restart, self.best, self.points)
                gradient = pick(restart, self._best_gradient, gradient)
                value = torch.where(restart, self._best_value, value)
            self._value = value
            self.points = self.rule.move(self.points, gradient)
        self._keep(self.oracle.still(self.rows, self.oracle.scores_cost))
        if len(self.rows):
            logits = self.oracle.scores(self.points, self.rows, self.loss, self.aim, candidate=self.candidate)
            self._remember(self.loss(logits, self.aim), self._best_gradient)

    def _ask(self) -> tuple[Tensor, Tensor]:
        """Return loss and gradient at the points, the mean of `eot` answers; the first one judges them."""
        value, gradient = self.oracle.gradient(self.points, self.rows, self.loss, self.aim, candidate=self.candidate)
        if self.eot == 1:
            return value, gradient
        # Whoever fell at the first answer, or paid for votes, asks no more.
        keep = self.oracle.still(self.rows, (self.eot - 1) * self.oracle.probe_cost)
        points, rows, aim = self.points[keep], self.rows[keep], self.aim.take(keep)
        for _ in range(1, self.eot if len(keep) else 1):
            other = self.oracle.gradient(points, rows, self.loss, aim, candidate=False)
            value, gradient = value.index_add(0, keep, other[0]), gradient.index_add(0, keep, other[1])
        answers = torch.ones_like(value).index_fill(0, keep, self.eot)
        return value / answers, gradient / answers.reshape(-1, 1, 1, 1)

    def _remember(self, value: Tensor, gradient: Tensor) -> None:
        better = value > self._best_value
        self._best_value = torch.where(better, value, self._best_value)
        self.best = pick(better, self.points, self.best)
        self._best_gradient = pick(better, gradient, self._best_gradient)

    def _keep(self, keep: Tensor) -> None:
        if len(keep) == len(self.rows):
            return
        self.rows, self.aim, self.points = self.rows[keep], self.aim.take(keep), self.points[keep]
        self.best, self._best_gradient = self.best[keep], self._best_gradient[keep]
        self._best_value, self._value = self._best_value[keep], self._value[keep]
        self.rule.take(keep)
