"""The attack on neighbours of activations: away from those of the true class, in among those of another one.

Threat: l2, without a budget (as near as possible) or with one; linf with one. Access: the inside of a defense that
compares activations with those of training samples (`core.insides.Neighbours`).
Source: Sitawarin and Wagner 2020, "Minimum-Norm Adversarial Examples on KNN and KNN-Based Models" (2003.06559), after
their 1903.08333. With guides g_i, training samples near the point, half of the true class (w = -1) and half of another
(w = +1), and r the distance to the k-th neighbour in a layer, it minimises
    ||x' - x||^2 + c sum over layers and guides of max(0, w_i (||phi(x') - phi(g_i)||^2 - r^2) + 1e-5);
guides and r are found anew every `refresh` steps, c is searched for each sample, and after a success fewer guides pull.
This is a joint objective: neighbours of one other class in every layer make the answer wrong and credible at once, and
a point counts where the defense is wrong and accepts it. A credibility has no gradient: it counts calibration samples.
Departures: guides are nearest by the sum of the squared distances in all layers (there: in the first), and of one other
class in the whole run. The image bounds are kept by clipping: the tanh of the original hardly moves black and white
pixels. Points are judged more often. With a budget the distance is no part of the loss: steps go along the steepest
descent of the sum, are projected, and each run pulls towards another class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from robustbench_lite.attacks._guides import Embedding, Guides, Survey
from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.goals import Goal, Targeted
from robustbench_lite.core.insides import Neighbours
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["DeepKNNAttack"]

DECAY, TINY = 0.99, 1e-8  # of RMSprop
FIRST_STEP = 0.25  # with a budget: length of the first step as a share of eps; it falls to a hundredth along a cosine


@dataclass(frozen=True)
class DeepKNNAttack(Attack):
    """Descent on hinges of distances to guides, with RMSprop for the nearest example, projected with a budget.

    Deterministic.

    Attributes:
        steps: steps of a run.
        runs: without a budget, the steps of the search for c; with one, the classes pulled towards, nearest first.
        guides: training samples that push or pull, half of each kind.
        learning_rate: of RMSprop, in the units of the images; without a budget.
        initial_const: the first c; times 10 after a failure, a tenth after a success, then bisection.
        refresh: steps between two choices of guides.
        judge_every: steps between two looks at what the defense says; the last point is always judged.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    needs: ClassVar[type | None] = Neighbours
    steps: int = 500
    runs: int = 5
    guides: int = 100
    learning_rate: float = 0.01
    initial_const: float = 1.0
    refresh: int = 100
    judge_every: int = 20

    def __post_init__(self) -> None:
        for name in ("steps", "runs", "guides", "refresh", "judge_every"):
            least = 2 if name == "guides" else 1
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"{name} must be a whole number, at least {least}, got {getattr(self, name)!r}")
        for name in ("learning_rate", "initial_const"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {getattr(self, name)}")

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is an l2 ball, or an linf ball with a budget."""
        return isinstance(threat, Lp) and (threat.norm == "l2" or (threat.norm == "linf" and threat.eps is not None))

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Search from the clean images, `runs` times.

        Raises:
            ValueError: a target of which the defense has no training sample.
        """
        inside = oracle.inside(Neighbours)  # type: ignore[type-abstract]
        _check_targets(goal, inside.reference_labels)
        embedding, survey = Embedding(cast(nn.Module, inside)), Survey(cast(nn.Module, inside), self.guides // 2)
        search = _Constants.start(len(x), self.initial_const, self.guides // 2, x.device)
        for number in range(self.runs):
            rows = oracle.standing(self._price(oracle, 0))
            if len(rows) == 0:
                break
            walk = _Walk(rows, x[rows], torch.zeros_like(x[rows]), search.const[rows], search.halves[rows])
            rank = 0 if threat.size is None else number
            won = self._descend(oracle, walk, embedding, survey, rank)
            search = search.after(won, self._halves(number, inside.k))
        return oracle.best

    def _descend(self, oracle: Oracle, walk: _Walk, embedding: Embedding, survey: Survey, rank: int) -> Tensor:
        """Run once, and return which of the whole batch succeeded in it, bool (B,)."""
        won = torch.zeros(len(oracle.x), dtype=torch.bool, device=oracle.x.device)
        pulled: Tensor | None = None
        for step in range(self.steps):
            if step % oracle.compact_every == 0 or oracle.max_queries is not None:
                keep = oracle.still(walk.rows, self._price(oracle, step))
                if len(keep) < len(walk.rows):
                    walk, pulled = walk.take(keep), None if pulled is None else pulled[keep]
            if len(walk.rows) == 0:
                return won
            if step % self.refresh == 0:
                guides, pulled = survey.guides(oracle, walk.points, walk.rows, pulled, rank)
                walk = replace(walk, guides=guides)
            assert walk.guides is not None
            slope = walk.guides.slope(oracle, walk.points, walk.rows, walk.halves, embedding)
            walk = self._step(oracle, walk, slope, step)
            if (step + 1) % self.judge_every == 0 or step + 1 == self.steps:
                keep = oracle.still(walk.rows, self._verdict_price(oracle))
                if len(keep):
                    self._judge(oracle, walk.points[keep], walk.rows[keep])
                    won[walk.rows[keep]] |= oracle.verdict
        return won

    def _price(self, oracle: Oracle, step: int) -> int:
        """Forward passes of a step: a survey where one is due, the gradient, and a verdict."""
        return 1 + self._verdict_price(oracle) + (step % self.refresh == 0)

    @staticmethod
    def _verdict_price(oracle: Oracle) -> int:
        return 1 if oracle.threat.size is None else oracle.judge_cost

    @staticmethod
    def _judge(oracle: Oracle, points: Tensor, rows: Tensor) -> None:
        """Put candidates forward; without a budget the distance ranks them, and their logits need not be paid."""
        if oracle.threat.size is None:
            oracle.labels(points, rows)
        else:
            oracle.judge(points, rows)

    @torch.no_grad()
    def _step(self, oracle: Oracle, walk: _Walk, slope: Tensor, step: int) -> _Walk:
        threat, x = cast(Lp, oracle.threat).take(walk.rows), oracle.x[walk.rows]
        if threat.eps is not None:
            share = FIRST_STEP * (0.01 + 0.99 * (1 + math.cos(math.pi * step / self.steps)) / 2)
            moved = walk.points + share * threat.radius(x) * threat.steepest(-slope)
            return replace(walk, points=threat.project(moved, x))
        whole = 2 * (walk.points - x) + walk.const.reshape(-1, 1, 1, 1) * slope
        squares = DECAY * walk.squares + (1 - DECAY) * whole.square()
        points = walk.points - self.learning_rate * whole / (squares.sqrt() + TINY)
        return replace(walk, points=points.clamp(*threat.bounds), squares=squares)

    def _halves(self, number: int, k: int) -> int:
        """Return how many guides of each kind are left after a success in this run: down to a bare majority of k."""
        most = self.guides // 2
        least = min((k + 1) // 2, most)
        return math.ceil(least + (most - least) * (self.runs - number - 1) / self.runs)


@dataclass(frozen=True, eq=False)
class _Walk:
    """Where n descents stand: rows of the batch (n,), points, mean squares of slopes (n, C, H, W), c, guides used."""

    rows: Tensor
    points: Tensor
    squares: Tensor
    const: Tensor
    halves: Tensor
    guides: Guides | None = None

    def take(self, keep: Tensor) -> _Walk:
        rows, points, squares, const, halves = (
            part[keep] for part in (self.rows, self.points, self.squares, self.const, self.halves)
        )
        return _Walk(rows, points, squares, const, halves, None if self.guides is None else self.guides.take(keep))


@dataclass(frozen=True, eq=False)
class _Constants:
    """The search for c of each sample of the batch, all (B,); `halves`: guides of each kind that it uses."""

    const: Tensor
    low: Tensor
    high: Tensor
    halves: Tensor

    @classmethod
    def start(cls, count: int, const: float, half: int, device: torch.device) -> _Constants:
        each = torch.full((count,), const, device=device)
        return cls(each, torch.zeros_like(each), torch.full_like(each, torch.inf), torch.full_like(each, half).long())

    def after(self, won: Tensor, halves: int) -> _Constants:
        high = torch.where(won, self.const, self.high)
        low = torch.where(won, self.low, self.const)
        const = torch.where(high.isinf(), self.const * 10, torch.where(low == 0, self.const / 10, (low + high) / 2))
        return _Constants(const, low, high, torch.where(won, halves, self.halves))


def _check_targets(goal: Goal, labels: Tensor) -> None:
    if not isinstance(goal, Targeted):
        return
    known = set(labels.tolist())
    missing = sorted(set(goal.labels.tolist()) - known)
    if missing:
        raise ValueError(
            f"the defense has no training sample of class {', '.join(map(str, missing))}, so it never answers that: "
            f"choose targets among the classes {sorted(known)}"
        )
