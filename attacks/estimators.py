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

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_lite.attacks._score_estimator import BLOCK, ScoreEstimator, blocks
from robustbench_lite.core.checks import parse_number
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams

__all__ = ["FiniteDifferenceEstimator", "NESEstimator", "SPSAEstimator", "ScoreEstimator"]


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


class _PairedEstimator(ScoreEstimator):
    """An estimate from `samples` probes in mirrored pairs along random directions, each pair of the same weight.

    Without fields of its own, so that those of subclasses keep their order.
    """

    samples: int

    def __post_init__(self) -> None:
        check_pairs(self.samples)

    @abstractmethod
    def draw(self, streams: Streams, count: int, size: int, dtype: torch.dtype) -> Tensor:
        """Draw the coefficients of directions (n, count, size)."""

    def probes(self, oracle: Oracle) -> int:
        """Return the number of probes."""
        return self.samples

    @property
    def weight(self) -> float:
        """One over the number of probes."""
        return 1 / self.samples

    def directions(self, x: Tensor, streams: Streams) -> Iterator[Tensor]:
        """Yield random directions."""
        size = self.basis.size(x.shape[1:])
        for count in blocks(self.samples // 2):
            yield self.draw(streams, count, size, x.dtype)


@dataclass(frozen=True)
class NESEstimator(_PairedEstimator):
    """Natural evolution strategies: g = 1 / (samples sigma) sum_i d_i [F(x + sigma d_i) - F(x - sigma d_i)].

    The sum is over samples / 2 normal directions d_i. On a linear model the cosine with the gradient is close to
    sqrt(p / (p + m + 1)) for p pairs and m coefficients of the basis (times the share of the gradient in its span).

    Attributes:
        basis: where directions are drawn; the estimate lies in its span.
        samples: probes of one estimate, an even number.
        sigma: standard deviation of the probes, in the units of the images; the default is for bounds (0, 1).

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    samples: int = 50
    sigma: float | str = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self.sigma, "sigma")

    @property
    def radius(self) -> float:
        """The standard deviation of the probes."""
        return parse_number(self.sigma)

    def draw(self, streams: Streams, count: int, size: int, dtype: torch.dtype) -> Tensor:
        """Draw normal directions."""
        return streams.normal(count, size, dtype=dtype)


@dataclass(frozen=True)
class SPSAEstimator(_PairedEstimator):
    """Simultaneous perturbation: the mean of v_i [F(x + delta v_i) - F(x - delta v_i)] / (2 delta), v_i of signs.

    Attributes:
        basis: where signs are drawn; the estimate lies in its span.
        samples: probes of one estimate, an even number: twice the paper's number of directions.
        delta: distance of a probe along each coefficient, in the units of the images; the default is for bounds (0, 1).

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    samples: int = 128
    delta: float | str = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self.delta, "delta")

    @property
    def radius(self) -> float:
        """The distance of a probe along each coefficient."""
        return parse_number(self.delta)

    def draw(self, streams: Streams, count: int, size: int, dtype: torch.dtype) -> Tensor:
        """Draw random signs."""
        return (2 * streams.integers(2, count, size) - 1).to(dtype)


@dataclass(frozen=True)
class FiniteDifferenceEstimator(ScoreEstimator):
    """One difference along each coefficient of the basis: the gradient itself, up to h.

    Attributes:
        basis: the coordinates; the estimate is the gradient projected on their span.
        h: distance of a probe, in the units of the images; the default is for bounds (0, 1). In float32 rounding costs
            about 1e-7 / h.
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
