"""The sum over directions that every gradient estimated from scores is; which directions, subclasses say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from robustbench_lite.attacks.basis import Basis, Pixels
from robustbench_lite.core.losses import Loss
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams

__all__ = ["BLOCK", "ScoreEstimator", "blocks", "losses_at"]

BLOCK = 8  # directions drawn at a time: a fixed number, so that memory never changes what a sample draws


@dataclass(frozen=True)
class ScoreEstimator(ABC):
    """An estimate of the gradient from differences of the loss along directions; subclasses say which, and how far."""

    basis: Basis = field(default_factory=Pixels, kw_only=True)

    @property
    def access(self) -> Access:
        """Scores are enough."""
        return Access.SCORES

    @property
    @abstractmethod
    def radius(self) -> float:
        """The length of a step along a direction, in the units of the images."""

    @property
    def mirrored(self) -> bool:
        """Whether each direction is probed on both sides, or on one, against the point itself."""
        return True

    @property
    @abstractmethod
    def weight(self) -> float:
        """The weight of one direction in the sum."""

    @abstractmethod
    def directions(self, x: Tensor, streams: Streams) -> Iterator[Tensor]:
        """Yield the directions in blocks of at most `BLOCK`: coefficients (n, k, m) for images x (n, C, H, W)."""

    @abstractmethod
    def probes(self, oracle: Oracle) -> int:
        """Return the forward passes that a sample pays for its probes."""

    def cost(self, oracle: Oracle) -> int:
        """Return the forward passes that a sample pays for one estimate, the judging of its point included."""
        return oracle.scores_cost + self.probes(oracle)

    def __call__(self, oracle: Oracle, points: Tensor, rows: Tensor, loss: Loss, streams: Streams) -> Tensor:
        """Put points (n, C, H, W) to the oracle as candidates, and return the estimates there, 0 for the fallen."""
        value = self.judge(oracle, points, rows, loss)
        keep = oracle.still(rows, self.probes(oracle))
        gradient = torch.zeros_like(points)
        if len(keep):
            gradient[keep] = self.estimate(oracle, points[keep], rows[keep], loss, value[keep], streams.take(keep))
        return gradient

    @staticmethod
    def judge(oracle: Oracle, points: Tensor, rows: Tensor, loss: Loss) -> Tensor:
        """Put points to the oracle as candidates, and return their loss in float64 (n,)."""
        return loss(oracle.scores(points, rows, loss).double(), oracle.goal.take(rows))

    @torch.no_grad()
    def estimate(
        self, oracle: Oracle, points: Tensor, rows: Tensor, loss: Loss, value: Tensor, streams: Streams
    ) -> Tensor:
        """Return the estimates (n, C, H, W) at points whose loss is known: `value` (n,). Judges nothing.

        No more than about `oracle.capacity` probes exist at a time, and never fewer than those of one block.
        """
        size = max(1, oracle.capacity // (2 * BLOCK))
        gradient = torch.empty_like(points)
        for part in torch.split(torch.arange(len(rows), device=rows.device), size):
            gradient[part] = self._estimate(
                oracle, points[part], rows[part], loss, value[part], streams.take(part) if len(rows) > size else streams
            )
        return gradient

    def _estimate(
        self, oracle: Oracle, points: Tensor, rows: Tensor, loss: Loss, value: Tensor, streams: Streams
    ) -> Tensor:
        shape = points.shape[1:]
        total = points.new_zeros(len(points), self.basis.size(shape))
        directions = self.directions(points, streams)
        at_once = max(1, oracle.capacity // (2 * BLOCK * len(rows)))  # blocks in one question
        while block := list(islice(directions, at_once)):
            coefficients = torch.cat(block, dim=1)
            steps = self.radius * self.basis.decode(coefficients, shape)
            slope = self._differences(oracle, points.unsqueeze(1), steps, rows, loss, value)
            slope = (slope * (self.weight / self.radius)).nan_to_num(0.0, 0.0, 0.0).to(points.dtype)
            total += (slope.unsqueeze(1) @ coefficients).squeeze(1)
        return self.basis.decode(total, shape)

    def _differences(
        self, oracle: Oracle, centre: Tensor, steps: Tensor, rows: Tensor, loss: Loss, value: Tensor
    ) -> Tensor:
        """Return F(x + step) - F(x - step), or F(x + step) - F(x), for steps (n, k, C, H, W): float64 (n, k)."""
        if not self.mirrored:
            return losses_at(oracle, centre + steps, rows, loss) - value.unsqueeze(1)
        ahead, behind = losses_at(oracle, torch.cat([centre + steps, centre - steps], dim=1), rows, loss).chunk(
            2, dim=1
        )
        return ahead - behind


def losses_at(oracle: Oracle, probes: Tensor, rows: Tensor, loss: Loss) -> Tensor:
    """Return the loss in float64 (n, k) at probes (n, k, C, H, W), which are no candidates: k forward passes a row."""
    count = probes.shape[1]
    owners = rows.repeat_interleave(count)
    logits = oracle.scores(probes.flatten(0, 1), owners, loss, candidate=False)
    return loss(logits.double(), oracle.goal.take(owners)).reshape(-1, count)


def blocks(count: int) -> Iterator[int]:
    """Split `count` draws into blocks of `BLOCK` and a rest."""
    for start in range(0, count, BLOCK):
        yield min(BLOCK, count - start)
