"""High confidence, low uncertainty: a wrong answer that a Gaussian process is as sure of as of a clean one.

Threat: l2 without a budget, the nearest such input; linf, l2 and l1 with one. Access: gradients, mean and variance of
an `Uncertain` defense.
Source: Grosse, Pfaff, Smith and Backes 2018, "The Limitations of Model Uncertainty in Adversarial Settings"
(1812.02606): min ||x' - x|| subject to confidence(wrong class) >= 0.95, v(x') <= v(x) and the image bounds, solved by
sequential quadratic programming for one sample after the other.
The means are those of a regression on labels +-1, so that (1 + m_k) / 2 estimates the probability of class k, and a
confidence of 0.95 asks for a mean of 0.9. Only points that keep both constraints are put forward; what is wrong from
the start falls at distance 0 nevertheless, as for any attack.
Departures: an augmented Lagrangian with its multipliers and penalties for each sample (the form of Powell, Hestenes and
Rockafellar), its inner problem by Adam, so that a batch runs at once; the variance is compared by its logarithm, as it
spans orders of magnitude; several wrong classes are tried. `variance_factor` is the paper's 1, while a well-known
implementation allows 100. Within a fixed budget there is nothing to minimise: steps go along the violated constraint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from robustbench_lite.attacks._targets import likeliest_targets
from robustbench_lite.attacks._violations import Aim, Question, descend
from robustbench_lite.attacks.base import Attack
from robustbench_lite.attacks.iterative import supports_steps
from robustbench_lite.core.goals import Goal, Targeted
from robustbench_lite.core.insides import Uncertain
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["HighConfidenceLowUncertainty"]

SLACK = 1e-3  # by which constraints are kept more than they must: in another batch rounding differs
DUAL_EVERY = 10  # steps between two updates of the multipliers
PENALTY = (0.1, 1e4)  # at first, and at most


class _Prediction(nn.Module):
    """Means and variance in one tensor (n, K + 1)."""

    def __init__(self, process: Uncertain) -> None:
        super().__init__()
        self.process = process

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.process.mean_and_variance(x)
        return torch.cat([mean, variance.unsqueeze(1)], dim=1)


@dataclass(frozen=True)
class HighConfidenceLowUncertainty(Attack):
    """The nearest input that is wrong with high confidence and no more variance than the clean one.

    Attributes:
        confidence: of the wrong class, in (0.5, 1); the mean must reach 2 confidence - 1.
        variance_factor: how many times the clean input's variance is allowed.
        targets: wrong classes that are tried, those with the largest means first.
        steps: gradient steps towards each.
        step_size: first step; it falls to a hundredth along a cosine. Without a budget that of Adam, a share of the
            range of the images; None: 0.1. Within a budget a share of eps; None: 0.3.
        restarts: rounds of runs; the first from the clean image, the others from random points: of the ball, or
            without a budget half-way to uniform noise. From the clean image alone some samples climb the mean into
            the empty space between the classes, where it is 0 and flat, and stay there.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    needs: ClassVar[type | None] = Uncertain

    confidence: float = 0.95
    variance_factor: float = 1.0
    targets: int = 9
    steps: int = 200
    step_size: float | None = None
    restarts: int = 2

    def __post_init__(self) -> None:
        if not 0.5 < self.confidence < 1:
            raise ValueError(f"confidence is a probability in (0.5, 1), got {self.confidence}")
        if not 0 < self.variance_factor < math.inf:
            raise ValueError(f"variance_factor must be > 0 and finite, got {self.variance_factor}")
        for name in ("targets", "steps", "restarts"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, got {getattr(self, name)!r}")
        if self.step_size is not None and not 0 < self.step_size <= 1:
            raise ValueError(f"step_size is a share in (0, 1], got {self.step_size}")

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is l2, or an linf or l1 ball with a budget."""
        return isinstance(threat, Lp) and (supports_steps(threat) or threat.norm == "l2")

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Head for each wrong class in turn."""
        prediction = _Prediction(oracle.inside(Uncertain))  # type: ignore[type-abstract]
        question = Question(prediction, self._constraints, 2)
        headings, bound = self._look(oracle, x, goal, replace(question, constraints=_variance, count=1))
        for number, heading in enumerate(headings * self.restarts):
            rows = oracle.standing(question.cost + oracle.judge_cost)
            if len(rows) == 0:
                break
            own = goal.take(rows)
            aim = Aim(own.labels, own, heading[rows], bound[rows], x.new_zeros(len(rows), 0))
            ball = cast(Lp, threat)
            start = x[rows] if number < len(headings) else _random_point(ball.take(rows), x[rows], streams.take(rows))
            if threat.size is None:
                self._nearest(oracle, rows, start, aim, question)
            else:
                size = 0.3 if self.step_size is None else self.step_size
                descend(oracle, ball, rows, start, aim, question, steps=self.steps, step_size=size)
        return oracle.best

    def _look(self, oracle: Oracle, x: Tensor, goal: Goal, question: Question) -> tuple[list[Tensor], Tensor]:
        """Return the classes to head for in each run, int64 (B,), and the largest variances allowed, (B, 1)."""
        bound = x.new_full((len(x), 1), math.nan)
        rows = oracle.standing(1 + question.cost)
        if len(rows) == 0:
            return [], bound
        means = oracle.scores(x[rows], rows, candidate=False)
        own = goal.take(rows)
        aim = Aim(own.labels, own, own.labels, x.new_zeros(len(rows), 0), x.new_zeros(len(rows), 0))
        variance, _ = question.ask(oracle, x[rows], rows, aim, lambda values, _: values.detach().squeeze(1))
        bound[rows] = self.variance_factor * variance
        if isinstance(goal, Targeted):
            return [goal.labels], bound
        likeliest = likeliest_targets(means, own.labels, self.targets)
        return [goal.labels.index_copy(0, rows, classes) for classes in likeliest.unbind(dim=1)], bound

    def _constraints(self, values: Tensor, aim: Aim) -> Tensor:
        """Return how far (n, 2) the mean is from the wanted one, and the logarithm of the variance over its bound."""
        wanted = values.gather(1, aim.targets.unsqueeze(1)).squeeze(1)
        excess = _log(values[:, -1]) - _log(aim.extra[:, 0])
        return torch.stack([2 * self.confidence - 1 - wanted, excess], dim=1) + SLACK

    def _nearest(self, oracle: Oracle, rows: Tensor, points: Tensor, aim: Aim, question: Question) -> None:
        """Minimise ||x' - x||^2 / 2 + sum_i (max(0, l_i + r_i c_i)^2 - l_i^2) / (2 r_i), and raise l_i, r_i meanwhile.

        Each sample has multipliers l_i and penalties r_i of its own, which travel in the aim behind the bound. Distance
        and variance count once the wanted mean is positive: between two classes lies a ridge of high variance, and a
        walk that minds it from the start stays on its own side.
        """
        low, high = oracle.threat.bounds
        size = (0.1 if self.step_size is None else self.step_size) * (high - low)
        x, limit = oracle.x[rows], aim.extra
        dual = _Dual(torch.zeros_like(limit.expand(-1, 2)), torch.full_like(limit.expand(-1, 2), PENALTY[0]))
        arrived = torch.zeros_like(limit[:, 0], dtype=torch.bool)
        walk = _Adam(torch.zeros_like(x), torch.zeros_like(x))
        reached = torch.full_like(limit[:, 0], torch.inf, dtype=torch.float64)
        for step in range(self.steps):
            keep = oracle.still(rows, question.cost + oracle.judge_cost)
            if len(keep) < len(rows):
                rows, points, x, limit, reached = rows[keep], points[keep], x[keep], limit[keep], reached[keep]
                aim, dual, walk, arrived = aim.take(keep), dual.take(keep), walk.take(keep), arrived[keep]
            if len(rows) == 0:
                return
            state = [limit, dual.multipliers, dual.penalties, arrived.unsqueeze(1).to(limit)]
            aim = replace(aim, extra=torch.cat(state, dim=1))
            values, slope = question.ask(oracle, points, rows, aim, _penalty)
            reached = self._judge(oracle, rows, points, values, reached)
            if (step + 1) % DUAL_EVERY == 0:
                dual = dual.raised(values, arrived)
            share = 0.01 + 0.99 * (1 + math.cos(math.pi * step / self.steps)) / 2
            pull = (points - x) * arrived.reshape(-1, 1, 1, 1)
            points, walk = walk.step(points, pull + slope, step, size * share)
            arrived = arrived | (values[:, 0] <= 2 * self.confidence - 1)  # the wanted mean is positive
            points = points.clamp(low, high)

    @staticmethod
    def _judge(oracle: Oracle, rows: Tensor, points: Tensor, values: Tensor, reached: Tensor) -> Tensor:
        """Put forward what keeps the constraints and is nearer than what was reached; return the distances reached."""
        distance = oracle.threat.distance(points, oracle.x[rows])
        nearer = ((values <= 0).all(dim=1) & (distance < reached)).nonzero().flatten()
        if len(nearer) == 0:
            return reached
        oracle.judge(points[nearer], rows[nearer])
        return reached.index_copy(0, nearer, torch.where(oracle.verdict, distance[nearer], reached[nearer]))


@dataclass(frozen=True)
class _Dual:
    """Multipliers and penalties (n, 2) of an augmented Lagrangian, and the violations at the last update."""

    multipliers: Tensor
    penalties: Tensor
    before: Tensor | None = None

    def take(self, keep: Tensor) -> _Dual:
        before = None if self.before is None else self.before[keep]
        return _Dual(self.multipliers[keep], self.penalties[keep], before)

    def raised(self, values: Tensor, arrived: Tensor) -> _Dual:
        """Return l <- max(0, l + r c), and r doubled where a violation has not halved since the last update.

        Samples that have not `arrived` (n,) keep theirs.
        """
        values = values.nan_to_num(0.0, 0.0, 0.0) * arrived.unsqueeze(1)
        multipliers = (self.multipliers + self.penalties * values).clamp_min(0)
        slow = (values > 0) & (values > 0.5 * (torch.inf if self.before is None else self.before))
        return _Dual(multipliers, torch.where(slow, 2 * self.penalties, self.penalties).clamp_max(PENALTY[1]), values)


@dataclass(frozen=True)
class _Adam:
    """The two averages (n, C, H, W) of Adam (Kingma and Ba 2014, 1412.6980)."""

    first: Tensor
    second: Tensor

    def take(self, keep: Tensor) -> _Adam:
        return _Adam(self.first[keep], self.second[keep])

    def step(self, points: Tensor, gradient: Tensor, number: int, size: float) -> tuple[Tensor, _Adam]:
        first, second = torch.lerp(gradient, self.first, 0.9), torch.lerp(gradient.square(), self.second, 0.999)
        unbiased = first / (1 - 0.9 ** (number + 1))
        scale = (second / (1 - 0.999 ** (number + 1))).sqrt() + 1e-8
        return points - size * unbiased / scale, _Adam(first, second)


def _random_point(threat: Lp, x: Tensor, streams: Streams) -> Tensor:
    if threat.size is not None:
        return threat.random_point(x, streams)
    low, high = threat.bounds
    return (x + low + (high - low) * streams.uniform(*x.shape[1:], dtype=x.dtype)) / 2


def _variance(values: Tensor, _: Aim) -> Tensor:
    return values[:, -1:]


def _log(variance: Tensor) -> Tensor:
    return variance.clamp_min(torch.finfo(variance.dtype).tiny).log()


def _penalty(values: Tensor, aim: Aim) -> Tensor:
    """Return the sum (n,) of max(0, l + r c)^2 / (2 r); before arrival the first constraint alone, as it is.

    Behind the first column of `aim.extra` come l, r and whether the sample has arrived.
    """
    multipliers, penalties, arrived = aim.extra[:, 1:3], aim.extra[:, 3:5], aim.extra[:, 5] > 0
    terms = (multipliers + penalties * values).clamp_min(0).square() / (2 * penalties)
    return torch.where(arrived, terms.sum(dim=1), values[:, 0])
