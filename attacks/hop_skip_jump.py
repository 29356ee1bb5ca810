"""HopSkipJump: to the decision boundary, its normal from labels alone, a jump along it, and back.

Threat: l2, linf; with a budget or as near as possible. Access: labels.
Source: Chen, Jordan and Wainwright 2019, "HopSkipJumpAttack: A Query-Efficient Decision-Based Attack" (1904.02144).
Departures: binary search stops at theta times the distance it starts from, in both norms (the original's linf
threshold is never more than theta itself); starts are sought among coarser
noise too, not among images of the target's class, which an attack does not hold; a sample that cannot pay for a
whole estimate makes a smaller one. With a budget a sample is done at its first success within eps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from robustbench_lite.attacks._decision import bisect, cut, fools, random_start, straight
from robustbench_lite.attacks._purse import Purse
from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.goals import Goal
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["HopSkipJump"]

BLOCK = 8  # directions in one draw, whatever the memory


@dataclass(frozen=True)
class HopSkipJump(Attack):
    """HopSkipJump with the geometric search for the step.

    Attributes:
        iterations: estimates of the normal, each followed by a jump and a binary search.
        probes: label queries of the first estimate; the t-th has sqrt(t) times as many.
        max_probes: most label queries of one estimate.
        gamma: scale of the binary search's relative threshold theta, gamma / d^1.5 for l2 and gamma / d^2 for linf
            with d values in an image, and of the probes' radius.
        draws: noise images tried for a start.
        queries: most label queries of a sample; None for no limit but the caller's. The draws that confirm a
            success against a randomised model are among them.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    iterations: int = 64
    probes: int = 100
    max_probes: int = 10000
    gamma: float = 1.0
    draws: int = 1000
    queries: int | None = None

    def __post_init__(self) -> None:
        for name in ("iterations", "probes", "max_probes", "draws", "queries"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1) and not (name == "queries" and value is None):
                raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
        if not self.gamma > 0:
            raise ValueError(f"gamma must be > 0, got {self.gamma}")

    @property
    def access(self) -> Access:
        """Labels are enough."""
        return Access.LABEL

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is an l2 or linf ball, with a budget or without."""
        return isinstance(threat, Lp) and threat.norm in ("l2", "linf")

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Start on the boundary; then estimate, jump and come back until the iterations or the queries are spent."""
        purse = Purse(oracle, self.queries)
        geometry = _Geometry.of(cast(Lp, threat).norm, x.shape[1:].numel(), self.gamma)
        halvings = max(1, math.ceil(-math.log2(geometry.theta)))
        reserve = halvings + 1  # for one jump, and the way back
        rows, points = random_start(oracle, purse, oracle.standing(), streams, self.draws)
        points = bisect(oracle, purse, rows, points, halvings, geometry.blend)
        for t in range(1, self.iterations + 1):
            keep = purse.still(rows, reserve + 1)
            rows, points = rows[keep], points[keep]
            if len(rows) == 0:
                break
            distance = threat.distance(points, x[rows]).to(x.dtype)
            first = 0.1 * (threat.bounds[1] - threat.bounds[0])
            radius = torch.full_like(distance, first) if t == 1 else geometry.spread * distance
            counts = (purse.left(rows) - reserve).clamp_max(min(int(self.probes * math.sqrt(t)), self.max_probes))
            normal = _normal(oracle, rows, points, radius, counts, geometry.noise, streams.take(rows))
            direction = cast(Lp, threat).steepest(normal)
            moved, far = _jump(oracle, purse, rows, points, direction, distance / math.sqrt(t), halvings)
            points[moved] = bisect(oracle, purse, rows[moved], far, halvings, geometry.blend)
        return oracle.best


@dataclass(frozen=True)
class _Geometry:
    """What differs between the norms.

    Attributes:
        theta: share of the distance at which binary search stops.
        spread: radius of the probes as a share of the distance.
        blend: the way from the clean image to a far one.
        noise: how probes are drawn, before they are scaled to length 1.
    """

    theta: float
    spread: float
    blend: Callable[[Tensor, Tensor, Tensor], Tensor]
    noise: Callable[..., Tensor]

    @classmethod
    def of(cls, norm: str, entries: int, gamma: float) -> _Geometry:
        """Return the geometry of images with this number of entries."""
        if norm == "l2":
            theta = gamma / entries**1.5
            return cls(theta, theta * math.sqrt(entries), straight, Streams.normal)
        theta = gamma / entries**2
        return cls(theta, theta * entries, cut, _symmetric)


def _symmetric(streams: Streams, *shape: int, dtype: torch.dtype) -> Tensor:
    return 2 * streams.uniform(*shape, dtype=dtype) - 1


def _normal(
    oracle: Oracle,
    rows: Tensor,
    points: Tensor,
    radius: Tensor,
    counts: Tensor,
    noise: Callable[..., Tensor],
    streams: Streams,
) -> Tensor:
    """Estimate the boundary's normal at points (n, C, H, W) by `counts` probes each: (n, C, H, W), of any length."""
    normal = torch.empty_like(points)
    for part in torch.split(torch.arange(len(rows), device=rows.device), max(1, oracle.capacity // BLOCK)):
        mean = _Mean(points[part])
        stack = max(1, oracle.capacity // (BLOCK * len(part)))
        for first in range(0, int(counts[part].max()), stack * BLOCK):
            asked = first + torch.arange(stack * BLOCK, device=rows.device) < counts[part].unsqueeze(1)
            asked = asked[:, : int(asked.sum(dim=1).max())]
            drawn = _directions(points[part], asked, noise, streams.take(part))
            reach = radius[part].clamp_min(torch.finfo(radius.dtype).tiny).reshape(-1, 1, 1, 1, 1)
            probes = (points[part].unsqueeze(1) + reach * drawn).clamp(*oracle.threat.bounds)
            fooled = torch.zeros_like(asked)
            fooled[asked] = fools(oracle, probes[asked], rows[part].repeat_interleave(asked.sum(dim=1)))
            mean.add((probes - points[part].unsqueeze(1)) / reach, fooled, asked)
        normal[part] = mean.normal()
    return normal


def _directions(points: Tensor, asked: Tensor, noise: Callable[..., Tensor], streams: Streams) -> Tensor:
    """Draw directions of length 1 in blocks: (n, k, C, H, W), zeros in blocks where a sample asks nothing."""
    blocks = []
    for block in torch.split(asked, BLOCK, dim=1):
        live = block[:, 0].nonzero().flatten()
        drawn = noise(streams.take(live), BLOCK, *points.shape[1:], dtype=points.dtype)[:, : block.shape[1]]
        blocks.append(points.new_zeros(*block.shape, *points.shape[1:]).index_copy_(0, live, drawn))
    directions = torch.cat(blocks, dim=1)
    length: Tensor = torch.linalg.vector_norm(directions, dim=(2, 3, 4), keepdim=True)
    return directions / length.clamp_min(torch.finfo(length.dtype).tiny)


class _Mean:
    """The mean of votes (1: fools, -1: does not) times steps, less the mean vote times the mean step.

    Where all votes agree nothing is taken off. Only sums are kept, however many probes there are.
    """

    def __init__(self, points: Tensor) -> None:
        self.steps, self.voted = torch.zeros_like(points), torch.zeros_like(points)
        self.votes, self.count = points.new_zeros(len(points)), points.new_zeros(len(points))

    def add(self, steps: Tensor, fooled: Tensor, asked: Tensor) -> None:
        """Take in steps (n, k, C, H, W), whether they fool and whether they were asked, bool (n, k)."""
        asked_as, votes = asked.to(steps.dtype), (2 * fooled.to(steps.dtype) - 1) * asked
        self.steps += torch.einsum("nk,nkchw->nchw", asked_as, steps)
        self.voted += torch.einsum("nk,nkchw->nchw", votes, steps)
        self.votes += votes.sum(dim=1)
        self.count += asked_as.sum(dim=1)

    def normal(self) -> Tensor:
        """Return the estimate (n, C, H, W)."""
        share = self.votes / self.count.clamp_min(1)
        baseline = torch.where(share.abs() == 1, 0, share).reshape(-1, 1, 1, 1)
        return self.voted - baseline * self.steps


def _jump(
    oracle: Oracle, purse: Purse, rows: Tensor, points: Tensor, direction: Tensor, length: Tensor, halvings: int
) -> tuple[Tensor, Tensor]:
    """Step along the normal, half as far each time, until the step lands on an adversarial image.

    Returns:
        The positions within `rows` that landed, and where (m, C, H, W).
    """
    landed, found = points.clone(), torch.zeros_like(rows, dtype=torch.bool)
    active = torch.arange(len(rows), device=rows.device)
    for halving in range(halvings):
        active = active[purse.still(rows[active])]
        if len(active) == 0:
            break
        step = length[active].reshape(-1, 1, 1, 1) / 2**halving
        proposals = (points[active] + step * direction[active]).clamp(*oracle.threat.bounds)
        oracle.labels(proposals, rows[active])
        hit = oracle.verdict
        landed[active[hit]], found[active[hit]] = proposals[hit], True
        active = active[~hit]
    moved = found.nonzero().flatten()
    return moved, landed[moved]
