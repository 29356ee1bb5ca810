"""NES where only the top of the answer is seen: start from an image of the wanted class, and shrink the ball around x.

Partial information and label-only are this search, with another loss of a probe each.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from itertools import islice
from typing import cast

import torch
from torch import Tensor

from robustbench_lite.attacks._decision import bisect, cut, random_start
from robustbench_lite.attacks._nes_search import PlateauSteps, State, check_queries, take
from robustbench_lite.attacks._nes_shrink import FIRST_CUT, Shrink
from robustbench_lite.attacks._purse import Purse
from robustbench_lite.attacks._score_estimator import BLOCK
from robustbench_lite.attacks.base import Attack
from robustbench_lite.attacks.basis import Basis, Pixels
from robustbench_lite.attacks.estimators import NESEstimator
from robustbench_lite.attacks.gallery import Gallery
from robustbench_lite.core.goals import Goal, Targeted
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["ShrinkingNES"]

BISECTIONS = 10


@dataclass(frozen=True)
class ShrinkingNES(Attack):
    """NES towards the class of a far image, in a ball that shrinks to the threat while the class stays in the top k.

    Attributes:
        k: classes that an answer shows.
        samples: probes of one estimate, an even number: mirrored pairs.
        sigma: standard deviation of the probes, in the units of the images; the default is for bounds (0, 1).
        lr: length of the first steps, in the units of the images; None: `eps / 5`.
        min_lr: length below which steps are not cut, in the units of the images; None: `floor * eps`.
        momentum: share of the old direction in the new one.
        plateau_length: losses in a window; when the newest is worse than the oldest, steps are cut.
        plateau_drop: what the length of the steps is then divided by.
        threshold: the ball shrinks while the loss is below this.
        conservative: the ball shrinks by the accepted cut over this.
        queries: forward passes that each sample may spend, the clean check aside.
        draws: images tried as a start, none of a gallery twice, until one has a wanted class.
        basis: where probes are drawn.
        gallery: images to start from; None: noise.
    """

    k: int = 1
    samples: int = 100
    sigma: float | str = 1e-3
    lr: float | str | None = None
    min_lr: float | str | None = None
    momentum: float = 0.9
    plateau_length: int = 20
    plateau_drop: float = 2.0
    threshold: float = 0.2
    conservative: float = 2.0
    queries: int = 100_000
    draws: int = 100
    basis: Basis = field(default_factory=Pixels)
    gallery: Gallery | None = None

    def __post_init__(self) -> None:
        self.estimator()
        self.steps()
        check_queries(self.queries)
        for name, value in (("k", self.k), ("draws", self.draws)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
        self.shrink()

    @property
    @abstractmethod
    def draws_in_losses(self) -> bool:
        """Whether `losses` draws from the stream of the directions, which are then asked block by block."""

    @property
    @abstractmethod
    def floor(self) -> float:
        """The default of `min_lr`, as a share of eps."""

    @property
    @abstractmethod
    def probe_cost(self) -> int:
        """Forward passes of one probe."""

    @abstractmethod
    def losses(self, oracle: Oracle, probes: Tensor, rows: Tensor, target: Tensor, streams: Streams) -> Tensor:
        """Return the loss, to be lowered, at probes (n, j, C, H, W): float64 (n, j), NaN where none is seen."""

    @abstractmethod
    def shown(self, oracle: Oracle, points: Tensor, rows: Tensor, target: Tensor, candidate: bool) -> Tensor:
        """Say at which points (n, C, H, W) the target is in the top k: bool (n,)."""

    def estimator(self) -> NESEstimator:
        """Return the estimator whose probes these are."""
        return NESEstimator(self.samples, self.sigma, basis=self.basis)

    def steps(self) -> PlateauSteps:
        """Return the rule for steps."""
        return PlateauSteps(self.lr, self.min_lr, self.momentum, self.plateau_length, self.plateau_drop, self.floor)

    def shrink(self) -> Shrink:
        """Return the rule for the ball."""
        return Shrink(self.threshold, self.conservative)

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is an linf ball with a budget."""
        return isinstance(threat, Lp) and threat.norm == "linf" and threat.eps is not None

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Find a start, draw it near, and let the ball shrink."""
        ball, purse = cast(Lp, threat), Purse(oracle, self.queries)
        rows, state = self._begin(oracle, purse, ball, streams)
        cost = self.samples * self.probe_cost
        while True:
            rows, state = take(purse.still(rows, cost), rows, state)
            if len(rows) == 0:
                return oracle.best
            gradient, value = self._estimate(oracle, rows, state, streams.take(rows))
            seen = value.isfinite().nonzero().flatten()
            moving, part = take(seen, rows, state)
            part, step = self.steps()(part, part["points"], -value[seen], gradient[seen], ball.take(moving))
            part = self.shrink()(oracle, purse, ball, moving, part | {"value": value[seen]}, step, self.shown)
            state = {name: tensor.index_copy(0, seen, part[name]) for name, tensor in state.items()}

    def _begin(self, oracle: Oracle, purse: Purse, threat: Lp, streams: Streams) -> tuple[Tensor, State]:
        rows, far = self._start(oracle, purse, streams)
        far = bisect(oracle, purse, rows, far, BISECTIONS, cut)
        keep = purse.still(rows, 1)
        rows, far = rows[keep], far[keep]
        goal, x, span = oracle.goal.take(rows), oracle.x[rows], threat.bounds[1] - threat.bounds[0]
        target = goal.labels
        if not isinstance(goal, Targeted) and len(rows):
            target = oracle.labels(far, rows, candidate=False)
            # A class to keep in sight: no refusal, and not the true one, which a randomised model may answer.
            seen = ((target >= 0) & (target != goal.labels)).nonzero().flatten()
            rows, far, target, x = rows[seen], far[seen], target[seen], x[seen]
        least = threat.take(rows).radius(x).reshape(-1).expand(len(x)).double()
        state = self.steps().start(x, threat.take(rows)) | {
            "points": far,
            "target": target,
            "goal_eps": least,
            "eps": torch.maximum((far - x).flatten(1).abs().amax(dim=1).double().clamp_max(span), least),
            "cut": torch.full_like(least, FIRST_CUT * span),
            "value": torch.zeros_like(least),
        }
        return rows, state

    def _start(self, oracle: Oracle, purse: Purse, streams: Streams) -> tuple[Tensor, Tensor]:
        """Return the rows for which an image of a wanted class was found, and the images."""
        if self.gallery is None:
            return random_start(oracle, purse, oracle.standing(), streams, self.draws)
        return self.gallery.start(oracle, purse, streams, self.draws)

    def _estimate(self, oracle: Oracle, rows: Tensor, state: State, streams: Streams) -> tuple[Tensor, Tensor]:
        """Return the gradient (n, C, H, W) of minus the loss and the mean loss (n,), NaN where no probe shows one."""
        size = max(1, oracle.capacity // max(2 * BLOCK, self.probe_cost))
        parts = [
            self._estimate_part(oracle, rows[part], state["points"][part], state["target"][part], streams.take(part))
            for part in torch.split(torch.arange(len(rows), device=rows.device), size)
        ]
        return torch.cat([gradient for gradient, _ in parts]), torch.cat([value for _, value in parts])

    def _estimate_part(
        self, oracle: Oracle, rows: Tensor, points: Tensor, target: Tensor, streams: Streams
    ) -> tuple[Tensor, Tensor]:
        """Average loss * direction / sigma over the probes that are seen; the mean loss is taken off before."""
        estimator, shape = self.estimator(), points.shape[1:]
        size = self.basis.size(shape)
        weighted, plain = (points.new_zeros(len(rows), size, dtype=torch.float64) for _ in range(2))
        total, count = (torch.zeros(len(rows), 1, dtype=torch.float64, device=points.device) for _ in range(2))
        drawn = estimator.directions(points, streams)
        at_once = 1 if self.draws_in_losses else max(1, oracle.capacity // (2 * BLOCK * len(rows)))
        while block := list(islice(drawn, at_once)):
            half = torch.cat(block, dim=1)
            directions = torch.cat([half, -half], dim=1)
            probes = points.unsqueeze(1) + estimator.radius * self.basis.decode(directions, shape)
            loss = self.losses(oracle, probes, rows, target, streams)
            seen = loss.isfinite().double()
            loss = loss.nan_to_num(0.0, 0.0, 0.0)
            sums = torch.stack([loss, seen], dim=1) @ directions.double()
            weighted, plain = weighted + sums[:, 0], plain + sums[:, 1]
            total, count = total + loss.sum(dim=1, keepdim=True), count + seen.sum(dim=1, keepdim=True)
        mean = total / count  # NaN where nothing is seen
        slope = (weighted - mean * plain) / (count * estimator.radius)
        return -self.basis.decode(slope.to(points.dtype), shape), mean.squeeze(1)
