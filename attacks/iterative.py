"""The iterative core: steps along the threat's steepest direction. Most gradient attacks are settings of it.

What varies is a part: where gradients come from (`Estimator`), which images a step may use (`Basis`), and whether steps
carry momentum.
"""

from __future__ import annotations

from abc import abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor

from robustbench_lite.attacks.base import Attack
from robustbench_lite.attacks.basis import Basis, Pixels
from robustbench_lite.core.checks import parse_number
from robustbench_lite.core.goals import Goal
from robustbench_lite.core.losses import Loss
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.rows import pick
from robustbench_lite.core.threats import Lp, Threat
from robustbench_lite.core.weighted import WeightedLp

__all__ = ["Ascent", "Autograd", "Estimator", "IterativeAttack", "supports_steps"]

Ball = Lp | WeightedLp


class Estimator(Protocol):
    """Where gradients come from; a frozen dataclass, so that it names itself in a stored result."""

    @property
    def access(self) -> Access:
        """What it needs to see of the model."""

    def cost(self, oracle: Oracle) -> int:
        """Return the forward passes of one call, the judging of the points included."""

    def __call__(self, oracle: Oracle, points: Tensor, rows: Tensor, loss: Loss, streams: Streams) -> Tensor:
        """Return the gradient (n, ...) of the loss at `points`, and put the points to the oracle as candidates.

        `streams` are those of the rows.
        """


@dataclass(frozen=True)
class Autograd:
    """The exact gradient, by back-propagation."""

    @property
    def access(self) -> Access:
        """Gradients."""
        return Access.GRADIENT

    def cost(self, oracle: Oracle) -> int:
        """Return the forward passes of one call."""
        return oracle.gradient_cost

    def __call__(self, oracle: Oracle, points: Tensor, rows: Tensor, loss: Loss, streams: Streams) -> Tensor:
        """Return the gradient (n, ...) of the loss at `points`."""
        return oracle.gradient(points, rows, loss)[1]


def supports_steps(threat: Threat) -> bool:
    """Say whether the threat has a steepest direction and a budget: an linf, l2 or l1 ball with an eps."""
    return isinstance(threat, (Lp, WeightedLp)) and threat.norm in ("linf", "l2", "l1") and threat.eps is not None


@dataclass(frozen=True)
class Ascent:
    """Projected steepest ascent: point <- project(point + step_size * steepest(gradient)), `steps` times.

    Attributes:
        loss: the function to ascend.
        steps: number of steps of a run.
        path: total length of the steps as a multiple of eps.
        step_size: length of one step in the units of the images, in place of `path * eps / steps`.
        density: for l1, the share of the coordinates that a step moves.
        restarts: runs, each on the samples that still stand.
        random_start: start uniformly in the ball; False: at the clean image, which allows one run only.
        momentum: share of the last direction that is kept; gradients, each over its l1 norm, add up to it.
        estimator: where gradients come from.
        basis: the changes that starts and steps may use; noise and gradients are projected on them.

    Raises:
        ValueError: a setting out of range.
    """

    loss: Loss
    steps: int
    path: float
    step_size: float | str | None = None
    density: float | None = None
    restarts: int = 1
    random_start: bool = False
    momentum: float = 0.0
    estimator: Estimator = field(default_factory=Autograd)
    basis: Basis = field(default_factory=Pixels)

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be a whole number, at least 1, got {self.steps!r}")
        if self.step_size is not None and not parse_number(self.step_size) > 0:
            raise ValueError(f"step_size must be > 0, got {self.step_size}; for pixel units write '2/255'")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")
        if not isinstance(self.restarts, int) or self.restarts < 1:
            raise ValueError(f"restarts must be a whole number, at least 1, got {self.restarts!r}")
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"{self.restarts} restarts from the clean image would all be the same: use random_start")
        if not self.momentum >= 0:
            raise ValueError(f"momentum must be >= 0, got {self.momentum}")

    def search(self, oracle: Oracle, threat: Ball, streams: Streams) -> None:
        """Run `restarts` ascents; the oracle keeps what is found. `streams` are those of the whole batch."""
        for _ in range(self.restarts):
            rows = oracle.standing(self.estimator.cost(oracle))
            self(oracle, threat, rows, self._start(oracle.x[rows], threat.take(rows), streams.take(rows)), streams)

    def _start(self, x: Tensor, threat: Ball, streams: Streams) -> Tensor:
        """Return where to begin, (n, C, H, W): a random start, too, keeps to the basis."""
        if not self.random_start:
            return x
        points = threat.random_point(x, streams)
        return points if isinstance(self.basis, Pixels) else threat.project(x + self.basis.project(points - x), x)

    def __call__(self, oracle: Oracle, threat: Ball, rows: Tensor, points: Tensor, streams: Streams) -> None:
        """Ascend from `points` (n, C, H, W) for `rows` of the batch; the oracle keeps what is found.

        Samples that have fallen, or cannot pay, leave on the way. `streams` are those of the whole batch.
        """
        cost = self.estimator.cost(oracle)
        ball, own = threat.take(rows), streams.take(rows)
        project, velocity = ball.projector(oracle.x[rows]), None
        # Who asks once a step about points of the oracle's own ball may keep the best ones when they leave.
        late = type(self.estimator) is Autograd and threat is oracle.threat and oracle.ranks_by(self.loss)
        best = _Best(points) if late else None
        for step in range(self.steps):
            if step % oracle.compact_every == 0:
                keep = oracle.still(rows, cost)
                if len(keep) < len(rows):
                    if best is not None:
                        best.leave(oracle, rows, keep)
                    rows, points = rows[keep], points.index_select(0, keep)
                    velocity = None if velocity is None else velocity.index_select(0, keep)
                    ball, own, project = ball.take(keep), own.take(keep), project.take(keep)
            if len(rows) == 0:
                return
            with nullcontext() if best is None else oracle.only_successes():
                gradient = self.basis.project(self.estimator(oracle, points, rows, self.loss, own))
            if best is not None:
                best.look(points, oracle.losses)
            if self.momentum:
                gradient = velocity = self._accumulate(velocity, gradient)
            points = project(self._step(ball, points, gradient))
        if best is not None:
            oracle.keep(best.points, rows, best.values)
        keep = oracle.still(rows, oracle.judge_cost)
        if len(keep):
            oracle.judge(points[keep], rows[keep], self.loss)

    def _accumulate(self, velocity: Tensor | None, gradient: Tensor) -> Tensor:
        size = gradient.abs().sum(dim=(1, 2, 3), keepdim=True)
        unit = gradient / torch.where(size > 0, size, 1)
        return unit if velocity is None else self.momentum * velocity + unit

    @torch.no_grad()
    def _step(self, threat: Ball, points: Tensor, gradient: Tensor) -> Tensor:
        direction = threat.steepest(gradient, self.density, at=points)
        if self.step_size is not None:
            return torch.add(points, direction, alpha=parse_number(self.step_size))
        share = self.path / self.steps
        if isinstance(threat.eps, Tensor):
            return torch.addcmul(points, direction, share * threat.radius(points))
        return torch.add(points, direction, alpha=share * float(cast(float, threat.eps)))


class _Best:
    """The points of highest loss (n, ...), the later one in a tie; points that are given are never changed."""

    def __init__(self, points: Tensor) -> None:
        self.points = points
        self.values = torch.full((len(points),), -torch.inf, dtype=points.dtype, device=points.device)

    def look(self, points: Tensor, values: Tensor) -> None:
        """Take in points, and their losses (n,)."""
        better = values >= self.values
        if points.device.type == "cpu" and bool(better.all()):
            self.points, self.values = points, values
        else:
            self.points, self.values = pick(better, points, self.points), torch.where(better, values, self.values)

    def leave(self, oracle: Oracle, rows: Tensor, keep: Tensor) -> None:
        """Go on with the positions `keep`; of the others, who cannot pay leaves without having fallen."""
        if oracle.max_queries is not None:
            oracle.keep(self.points, rows, self.values)
        self.points, self.values = self.points.index_select(0, keep), self.values.index_select(0, keep)


@dataclass(frozen=True)
class IterativeAttack(Attack):
    """An attack that is a setting of the iterative core: a subclass has fields, and says in `ascent` what they mean."""

    def __post_init__(self) -> None:
        self.ascent()  # which checks the fields

    @abstractmethod
    def ascent(self) -> Ascent:
        """Return the ascent that this attack runs."""

    @property
    def access(self) -> Access:
        """What the estimator of the gradients needs to see of the model."""
        return self.ascent().estimator.access

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is an linf, l2 or l1 ball with a budget."""
        return supports_steps(threat)

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Run the ascent, with its restarts, on the samples that still stand."""
        self.ascent().search(oracle, cast(Ball, threat), streams)
        return oracle.best
