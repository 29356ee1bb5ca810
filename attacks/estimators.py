"""Gradients from scores alone: parts for any attack that takes an `Estimator`.

Each one asks the loss at probes around a point, in pairs x + d and x - d where it can, and adds up the differences. A
probe costs one forward pass. Probes are not clipped to the image bounds, as in the originals; candidates always are.
Sources: Ilyas, Engstrom, Athalye and Lin 2018, "Black-box Adversarial Attacks with Limited Queries and Information"
(1804.08598); Uesato, O'Donoghue, van den Oord and Kohli 2018, "Adversarial Risk and the Dangers of Evaluating Against
Weak Attacks" (1802.05666); Chen, Zhang, Sharma, Yi and Hsieh 2017, "ZOO" (1708.03999) for random coordinates.
Departures: losses are computed from the scores in float64, where a saturated cross-entropy still has a slope; a sample
that falls at the point itself pays for no probes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from robustbench_lite.attacks.basis import Basis, Pixels
from robustbench_lite.core.checks import parse_number
from robustbench_lite.core.losses import Loss
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams

__all__ = ["FiniteDifferenceEstimator", "NESEstimator", "SPSAEstimator", "ScoreEstimator"]

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


def check_pairs(samples: int) -> None:
    """Check a number of probes that come in mirrored pairs.

    Raises:
        ValueError: not an even whole number, at least 2.
    """
    if not isinstance(samples, int) or samples < 2 or samples % 2:
        raise ValueError(f"samples must be an even number of probes, at least 2 (mirrored pairs), got {samples!r}")


def _positive(value: float | str, name: str) -> float:
    number = parse_number(value)
    if not number > 0:
        raise ValueError(f"{name} must be > 0, got {value}; it is in the units of the images")
    return number


def blocks(count: int) -> Iterator[int]:
    """Split `count` draws into blocks of `BLOCK` and a rest."""
    for start in range(0, count, BLOCK):
        yield min(BLOCK, count - start)


@dataclass(frozen=True)
class NESEstimator(ScoreEstimator):
    """Natural evolution strategies: g = 1 / (samples sigma) sum_i d_i [F(x + sigma d_i) - F(x - sigma d_i)].

    The sum is over samples / 2 normal directions d_i. On a linear model the cosine with the gradient is close to
    sqrt(p / (p + m + 1)) for p pairs and m coefficients of the basis (times the share of the gradient in its span).

    Attributes:
        basis: where directions are drawn; the estimate lies in its span.
        samples: probes of one estimate, an even number.
        sigma: standard deviation of the probes, in the units of the images.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    samples: int = 50
    sigma: float | str = 1e-3

    def __post_init__(self) -> None:
        check_pairs(self.samples)
        _positive(self.sigma, "sigma")

    @property
    def radius(self) -> float:
        """The standard deviation of the probes."""
        return parse_number(self.sigma)

    def probes(self, oracle: Oracle) -> int:
        """Return the number of probes."""
        return self.samples

    @property
    def weight(self) -> float:
        """One over the number of probes."""
        return 1 / self.samples

    def directions(self, x: Tensor, streams: Streams) -> Iterator[Tensor]:
        """Yield normal directions."""
        size = self.basis.size(x.shape[1:])
        for count in blocks(self.samples // 2):
            yield streams.normal(count, size, dtype=x.dtype)


@dataclass(frozen=True)
class SPSAEstimator(ScoreEstimator):
    """Simultaneous perturbation: the mean of v_i [F(x + delta v_i) - F(x - delta v_i)] / (2 delta), v_i of signs.

    Attributes:
        basis: where signs are drawn; the estimate lies in its span.
        samples: probes of one estimate, an even number: twice the paper's number of directions.
        delta: distance of a probe along each coefficient, in the units of the images.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    samples: int = 128
    delta: float | str = 0.01

    def __post_init__(self) -> None:
        check_pairs(self.samples)
        _positive(self.delta, "delta")

    @property
    def radius(self) -> float:
        """The distance of a probe along each coefficient."""
        return parse_number(self.delta)

    def probes(self, oracle: Oracle) -> int:
        """Return the number of probes."""
        return self.samples

    @property
    def weight(self) -> float:
        """One over the number of probes."""
        return 1 / self.samples

    def directions(self, x: Tensor, streams: Streams) -> Iterator[Tensor]:
        """Yield random signs."""
        size = self.basis.size(x.shape[1:])
        for count in blocks(self.samples // 2):
            yield (2 * streams.integers(2, count, size) - 1).to(x.dtype)


@dataclass(frozen=True)
class FiniteDifferenceEstimator(ScoreEstimator):
    """One difference along each coefficient of the basis: the gradient itself, up to h.

    Attributes:
        basis: the coordinates; the estimate is the gradient projected on their span.
        h: distance of a probe, in the units of the images. In float32 rounding costs about 1e-7 / h.
        two_sided: probe on both sides, with an error of h^2 instead of h, at twice the price.
        coordinates: estimate this many coordinates, drawn anew for each sample and call, and leave the others 0;
            None: all.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    h: float | str = 1e-3
    two_sided: bool = False
    coordinates: int | None = None

    def __post_init__(self) -> None:
        _positive(self.h, "h")
        if self.coordinates is not None and (not isinstance(self.coordinates, int) or self.coordinates < 1):
            raise ValueError(f"coordinates must be a whole number, at least 1, or None, got {self.coordinates!r}")

    @property
    def radius(self) -> float:
        """The distance of a probe."""
        return parse_number(self.h)

    @property
    def mirrored(self) -> bool:
        """Whether both sides are probed."""
        return self.two_sided

    def probes(self, oracle: Oracle) -> int:
        """Return one or two probes for each coordinate."""
        return self._count(self.basis.size(oracle.x.shape[1:])) * (2 if self.two_sided else 1)

    @property
    def weight(self) -> float:
        """One over the number of sides."""
        return 0.5 if self.two_sided else 1.0

    def directions(self, x: Tensor, streams: Streams) -> Iterator[Tensor]:
        """Yield the unit coefficients."""
        size = self.basis.size(x.shape[1:])
        if self.coordinates is None or self.coordinates >= size:
            chosen = torch.arange(size, device=x.device).expand(len(x), size)
        else:
            chosen = streams.uniform(size).topk(self.coordinates, dim=1).indices
        for part in torch.split(chosen, BLOCK, dim=1):
            yield torch.nn.functional.one_hot(part, size).to(x.dtype)

    def _count(self, size: int) -> int:
        return size if self.coordinates is None else min(self.coordinates, size)
