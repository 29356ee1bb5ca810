"""Boundary attack: a random walk along the decision boundary towards the clean image, from labels alone.

Threat: l2; with a budget or as near as possible. Access: labels.
Source: Brendel, Rauber and Bethge 2017, "Decision-Based Adversarial Attacks: Reliable Attacks Against Black-Box Machine
Learning Models" (1712.04248); the walk over low frequencies is LF-Boundary of Guo, Frank and Weinberger 2018, "Low
Frequency Adversarial Perturbation" (1809.08758).
Departures: each sample adapts its own two steps, over windows of 10 trials that start afresh (foolbox's run over 30
and 100 of every tenth); a proposal that succeeds counts as a move along the sphere that does; binary search brings the
start to the boundary. In a basis, too, proposals lose their part along the line to the clean image and return to the
sphere: the public code of LF-Boundary takes, in pixels, another part off. It keeps all frequencies unless told, and its
authors search the share for each image; here a quarter of them along each axis is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustbench_lite.attacks._decision import bisect, fools, random_start
from robustbench_lite.attacks._purse import Purse
from robustbench_lite.attacks.base import Attack
from robustbench_lite.attacks.basis import DCT, Basis, Pixels
from robustbench_lite.core.goals import Goal
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["Boundary", "LowFrequencyBoundary"]

START_HALVINGS = 10  # brings the start to within a thousandth of its distance from the boundary


@dataclass(frozen=True)
class Boundary(Attack):
    """The Boundary attack.

    A step draws a direction in the basis, at right angles to the line to the clean image, moves along the sphere around
    the clean image, then towards it; the new point is kept where it is adversarial and nearer.

    Attributes:
        steps: proposals for each sample.
        spherical_step: first length of the move along the sphere, as a share of the distance.
        source_step: first length of the move towards the clean image, as a share of the distance.
        factor: what a step that is adapted is multiplied or divided by.
        spherical_rates: (low, high): both steps shrink where fewer of the moves along the sphere stay adversarial, and
            grow where more do; None: the spherical step stays as it is, and nothing is spent on looking.
        source_rates: (low, high): likewise the share of proposals that are adversarial, for the source step alone.
        window: proposals, and looks, between two adaptations.
        look_every: steps between two looks at the move along the sphere alone, one query where the proposal failed.
        converged: a sample stops when its source step falls below this.
        draws: noise images tried for a start.
        queries: most label queries of a sample; None for no limit but the caller's. The draws that confirm a
            success against a randomised model are among them.
        basis: the images that directions are drawn from.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    steps: int = 25000
    spherical_step: float = 0.01
    source_step: float = 0.01
    factor: float = 1.5
    spherical_rates: Sequence[float] | None = (0.2, 0.5)
    source_rates: Sequence[float] = (0.1, 0.25)
    window: int = 10
    look_every: int = 10
    converged: float = 1e-7
    draws: int = 1000
    queries: int | None = None
    basis: Basis = field(default_factory=Pixels)

    def __post_init__(self) -> None:
        for name in ("steps", "window", "look_every", "draws", "queries"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1) and not (name == "queries" and value is None):
                raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
        for name in ("spherical_step", "source_step", "converged"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not self.factor > 1:
            raise ValueError(f"factor must be > 1, got {self.factor}")
        for name in ("spherical_rates", "source_rates"):
            rates = getattr(self, name)
            if rates is None and name == "spherical_rates":
                continue
            if rates is None or len(rates) != 2 or not 0 <= rates[0] < rates[1] <= 1:
                raise ValueError(f"{name} must be (low, high) with 0 <= low < high <= 1, got {rates}")
            object.__setattr__(self, name, tuple(rates))

    @property
    def access(self) -> Access:
        """Labels are enough."""
        return Access.LABEL

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is an l2 ball, with a budget or without."""
        return isinstance(threat, Lp) and threat.norm == "l2"

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Find a start, bring it to the boundary, and walk."""
        purse = Purse(oracle, self.queries)
        rows, points = random_start(oracle, purse, oracle.standing(), streams, self.draws)
        points = bisect(oracle, purse, rows, points, START_HALVINGS)
        walk = _Walk.start(rows, points, self.spherical_step, self.source_step)
        for step in range(1, self.steps + 1):
            if (step - 1) % purse.compact_every == 0:
                walk = walk.take(purse.still(walk.rows))
                walk = walk.take((walk.source >= self.converged).nonzero().flatten())
            if len(walk.rows) == 0:
                break
            sideways, nearer = self._propose(x[walk.rows], walk, streams.take(walk.rows), threat.bounds)
            oracle.labels(nearer, walk.rows)
            hit = oracle.verdict
            closer = threat.distance(nearer, x[walk.rows]) < threat.distance(walk.points, x[walk.rows])
            walk.points = torch.where((hit & closer).reshape(-1, 1, 1, 1), nearer, walk.points)
            if self.spherical_rates is not None and step % self.look_every == 0:
                self._look(oracle, purse, walk, sideways, hit, self.spherical_rates)
            walk.source = walk.source * self._scale(walk.proposals, hit, self.source_rates)
        return oracle.best

    def _propose(self, x: Tensor, walk: _Walk, streams: Streams, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """Return a point on the sphere around x through the walker, and the point from there towards x."""
        shape = x.shape[1:]
        line = x - walk.points
        distance = _length(line)
        drawn = self.basis.decode(streams.normal(self.basis.size(shape), dtype=x.dtype), shape)
        inwards = line / distance
        drawn = drawn - (drawn * inwards).sum(dim=(1, 2, 3), keepdim=True) * inwards
        spherical, source = walk.spherical.reshape(-1, 1, 1, 1), walk.source.reshape(-1, 1, 1, 1)
        drawn = drawn * (spherical * distance / _length(drawn))
        sideways = (x + (drawn - line) / (1 + spherical.square()).sqrt()).clamp(*bounds)
        left = _length(x - sideways)
        share = ((source * distance + left - distance) / left).clamp(0, 1)
        return sideways, torch.lerp(sideways, x, share).clamp(*bounds)

    def _look(
        self, oracle: Oracle, purse: Purse, walk: _Walk, sideways: Tensor, hit: Tensor, rates: Sequence[float]
    ) -> None:
        """Ask about the move along the sphere alone where the proposal failed, and adapt both steps."""
        asked = (~hit).nonzero().flatten()
        asked = asked[purse.still(walk.rows[asked])]
        stays = hit.clone()
        if len(asked):
            stays[asked] = fools(oracle, sideways[asked], walk.rows[asked])
        scale = self._scale(walk.looks, stays, rates)
        walk.spherical, walk.source = walk.spherical * scale, walk.source * scale

    def _scale(self, tally: _Tally, hit: Tensor, rates: Sequence[float]) -> Tensor:
        """Count, and return what the step is multiplied by: 1 except where a window is full."""
        rate = tally.count(hit, self.window)
        return 1 + (self.factor - 1) * (rate > rates[1]) + (1 / self.factor - 1) * (rate < rates[0])


@dataclass
class _Tally:
    """Counts successes, and starts over after a window. All (n,)."""

    trials: Tensor
    hits: Tensor

    def count(self, hit: Tensor, window: int) -> Tensor:
        """Count one trial each; return the rates (n,) where the window is full, NaN elsewhere."""
        self.trials, self.hits = self.trials + 1, self.hits + hit
        full = self.trials == window
        rate = torch.where(full, self.hits / window, torch.nan)
        self.trials, self.hits = self.trials * ~full, self.hits * ~full
        return rate

    def take(self, keep: Tensor) -> _Tally:
        return _Tally(self.trials[keep], self.hits[keep])


@dataclass
class _Walk:
    """The samples that still walk: their rows, where they are (n, C, H, W), and their own two steps (n,)."""

    rows: Tensor
    points: Tensor
    spherical: Tensor
    source: Tensor
    proposals: _Tally
    looks: _Tally

    @classmethod
    def start(cls, rows: Tensor, points: Tensor, spherical: float, source: float) -> _Walk:
        def ones() -> Tensor:
            return points.new_ones(len(rows))

        none = torch.zeros_like(rows)
        return cls(rows, points, spherical * ones(), source * ones(), _Tally(none, none), _Tally(none, none))

    def take(self, keep: Tensor) -> _Walk:
        if len(keep) == len(self.rows):
            return self
        return _Walk(
            self.rows[keep],
            self.points[keep],
            self.spherical[keep],
            self.source[keep],
            self.proposals.take(keep),
            self.looks.take(keep),
        )


def _length(d: Tensor) -> Tensor:
    """Return the Euclidean lengths (n, 1, 1, 1), never 0."""
    length: Tensor = torch.linalg.vector_norm(d, dim=(1, 2, 3), keepdim=True)
    return length.clamp_min(torch.finfo(d.dtype).tiny)


@dataclass(frozen=True)
class LowFrequencyBoundary(Boundary):
    """The Boundary attack over the low frequencies of the DCT, with the step rules of its authors.

    The same attack with other defaults: a long spherical step that is never adapted, and the source step by the rates
    (0.2, 0.6) over 50 proposals.
    """

    spherical_step: float = 0.2
    spherical_rates: Sequence[float] | None = None
    source_rates: Sequence[float] = (0.2, 0.6)
    window: int = 50
    basis: Basis = field(default_factory=DCT)
