"""Auto-PGD: projected gradient ascent that sets its own step sizes; the core of AutoAttack.

Threat: linf, l2, l1. Access: gradients.
Source: Croce and Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks" (2003.01690); for l1 Croce and Hein 2021, "Mind the box: l1-APGD for sparse adversarial attacks on image
classifiers" (2103.01208).
Departures: where the authors' code and the paper differ, the paper's rules hold (the counted steps must be *fewer*
than rho, and the start is the first point to rise above). l2 projects exactly on ball and box, the original on the ball
and then on the box; l1 steps skip coordinates at an image bound that point out of it. A sample leaves at its first
success. With several gradients an iterate (`eot`), losses are averaged as gradients are. The difference of logits
ratio needs 3 classes, or 4 towards a target; with fewer, the original fails and ours divides by the spread that is
left, z_(1) - z_(3), or with two classes by nothing. A targeted goal names no true label: the ratio's numerator is
z_t - max_{j != t} z_j then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from robustbench_lite.attacks._apgd_climb import Climb
from robustbench_lite.attacks._apgd_rules import rule_for
from robustbench_lite.attacks._targets import LOSSES, Towards, likeliest_targets
from robustbench_lite.attacks.base import Attack
from robustbench_lite.attacks.iterative import supports_steps
from robustbench_lite.core.errors import lookup
from robustbench_lite.core.goals import Goal, Targeted
from robustbench_lite.core.losses import Loss
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["APGD"]

WIDE = ((3, 0.3), (2, 0.3))  # radii of the searches that come first, as multiples of eps, and their shares of the steps


@dataclass(frozen=True)
class APGD(Attack):
    """Auto-PGD with random starts, towards any wrong class or towards several targets in turn.

    Attributes:
        steps: gradient steps in each run.
        restarts: runs from fresh random starts, for each target where there are several.
        loss: "ce", "margin" or "dlr" (difference of logits ratio); with "_targeted" behind it, for an untargeted goal,
            one run towards each of the likeliest wrong classes of the clean image.
        target_classes: how many of these classes; fewer where there are not as many.
        rho: share of the steps between two checkpoints that must raise the loss, or the step size is halved.
        eot: gradients averaged at each iterate, for randomised models.
        wide_start: spend 30 % of the steps in the ball of 3 eps, 30 % in that of 2 eps, and the rest in the ball,
            each search from the best point of the one before. The original's for l1; elsewhere it is one more way in,
            where gradients near the clean image mislead.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    steps: int = 100
    restarts: int = 1
    loss: str = "ce"
    target_classes: int = 9
    rho: float = 0.75
    eot: int = 1
    wide_start: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "restarts", "target_classes", "eot"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
        if not 0 < self.rho <= 1:
            raise ValueError(f"rho must be in (0, 1], got {self.rho}")
        self._loss()

    def _loss(self) -> Loss:
        return lookup(self.loss.removesuffix("_targeted"), LOSSES, "loss")

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is an linf, l2 or l1 ball with a budget."""
        return isinstance(threat, Lp) and supports_steps(threat)

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Run `restarts` searches for each aim, each on the samples that still stand."""
        for aim in self._aims(oracle, x, goal):
            for _ in range(self.restarts):
                rows = oracle.standing(self.step_cost(oracle))
                if len(rows):
                    self.search(oracle, rows, aim.take(rows), cast(Lp, threat).take(rows), streams.take(rows))
        return oracle.best

    def step_cost(self, oracle: Oracle) -> int:
        """Return the forward passes of one step."""
        return self.eot * oracle.gradient_cost

    def _aims(self, oracle: Oracle, x: Tensor, goal: Goal) -> Iterator[Goal]:
        """Yield what the loss heads for: the goal, or the label and one target after the other."""
        if isinstance(goal, Targeted) or not self.loss.endswith("_targeted"):
            yield goal
            return
        rows = oracle.standing()
        if len(rows):
            logits = oracle.scores(x[rows], rows, candidate=False)
            for target in likeliest_targets(logits, goal.labels[rows], self.target_classes).unbind(dim=1):
                yield Towards(goal.labels, goal.labels.index_copy(0, rows, target))

    def search(self, oracle: Oracle, rows: Tensor, aim: Goal, threat: Lp, streams: Streams) -> None:
        """Search once from a random start; on request in wider balls first.

        Args:
            oracle: answers questions, and keeps what is found.
            rows: int64 (n,) rows of the batch, which can pay for a step.
            aim: what the loss heads for, one label a row.
            threat: the threat of these rows.
            streams: the random streams of these rows.
        """
        stages = self._stages()
        x = oracle.x[rows]
        points = _random_start(_widened(threat, stages[0][0], x), x, streams)
        for factor, steps in stages:
            ball = _widened(threat, factor, x)
            points = ball.project(points, x)
            rule = rule_for(ball, x, points, steps, self.rho, resumed=len(stages) > 1)
            climb = Climb(oracle, rows, aim, points, rule, self._loss(), self.eot, candidate=factor == 1)
            climb.run(steps)
            keep, points = torch.isin(rows, climb.rows).nonzero().flatten(), climb.best
            rows, aim, threat, x = climb.rows, climb.aim, threat.take(keep), x[keep]

    def _stages(self) -> list[tuple[int, int]]:
        """Return radii, as multiples of eps, and the steps to spend in each."""
        if not self.wide_start:
            return [(1, self.steps)]
        wide = [(factor, math.ceil(share * self.steps)) for factor, share in WIDE]
        return [*wide, (1, max(self.steps - sum(steps for _, steps in wide), 1))]


def _widened(threat: Lp, factor: int, x: Tensor) -> Lp:
    """Return the threat with `factor` times the radius; in linf at most the whole image range."""
    if factor == 1:
        return threat
    radius = (factor * threat.radius(x)).flatten().expand(len(x))
    span = threat.bounds[1] - threat.bounds[0]
    return replace(threat, eps=radius.clamp_max(span) if threat.norm == "linf" else radius)


def _random_start(threat: Lp, x: Tensor, streams: Streams) -> Tensor:
    """Return a point on the ball's boundary, cut to the image bounds: where the original starts."""
    shape = x.shape[1:]
    if threat.norm == "linf":
        noise = 2 * streams.uniform(*shape, dtype=x.dtype) - 1
        noise = noise / noise.abs().amax(dim=(1, 2, 3), keepdim=True)
    else:
        noise = streams.normal(*shape, dtype=x.dtype)
    if threat.norm == "l1":  # the projection of a normal draw: only its largest entries are left
        return threat.project(x + noise, x)
    direction = noise if threat.norm == "linf" else threat.steepest(noise)
    return threat.project(x + threat.radius(x) * direction, x)
