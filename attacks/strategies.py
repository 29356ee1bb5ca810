"""Evolution strategies: search distributions over coefficients, as parts for `EvolutionStrategy`.

Sources: Wierstra, Schaul, Glasmachers, Sun and Schmidhuber 2011, "Natural Evolution Strategies" (1106.4487); Salimans,
Ho, Chen, Sidor and Sutskever 2017, "Evolution Strategies as a Scalable Alternative to Reinforcement Learning"
(1703.03864); Hansen 2016, "The CMA Evolution Strategy: A Tutorial" (1604.00772).
Departures: lengths are shares of the threat's radius, so that one setting serves every eps and basis.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_lite.attacks import _cma_es
from robustbench_lite.core.rng import Streams

__all__ = ["CMAES", "OpenAIES", "RankNES", "Strategy"]

State = dict[str, Tensor]
LARGEST_CMA = 512  # coefficients: an eigendecomposition takes the cube of their number
MATRICES, VECTORS = 8, 12  # that a state and its update hold
COPIES = 7  # of a generation: draws and members, with the halves and the order they are made by


@dataclass(frozen=True)
class Strategy(ABC):
    """A search distribution for each sample: where its members are drawn, and how it moves on their losses.

    A state is a dictionary of float64 tensors with one row a sample; "mean" (n, m) is the middle of the distribution.

    Attributes:
        sigma: length of the first draws, as a share of the threat's radius.
    """

    sigma: float = 1.0

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ValueError(f"sigma must be > 0, got {self.sigma}; it is a share of the threat's radius")

    @abstractmethod
    def members(self, size: int) -> int:
        """Return the number of members of a generation in `size` dimensions."""

    def state_bytes(self, size: int) -> int:
        """Return the bytes that the state of one search takes, what an update makes of it included."""
        return 8 * VECTORS * size

    def generation_bytes(self, size: int) -> int:
        """Return the bytes that a generation of one search takes: it is held whole, in float64."""
        return 8 * COPIES * self.members(size) * size

    @abstractmethod
    def start(self, unit: Tensor, size: int) -> State:
        """Return distributions at 0; `unit` (n, 1) is the standard deviation of draws as long as the radius."""

    @abstractmethod
    def draw(self, size: int, streams: Streams) -> Tensor:
        """Draw the members' normal vectors (n, lambda, m)."""

    @abstractmethod
    def offspring(self, state: State, draws: Tensor) -> Tensor:
        """Return the members (n, lambda, m) that draws stand for."""

    @abstractmethod
    def update(self, state: State, draws: Tensor, loss: Tensor, generation: int) -> State:
        """Return the state after a generation whose members have this loss (n, lambda), to be raised."""


def _best_first(loss: Tensor) -> Tensor:
    return loss.nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True, stable=True)


def _check_population(population: int) -> None:
    if not isinstance(population, int) or population < 4:
        raise ValueError(f"population must be a whole number, at least 4, got {population!r}")


@dataclass(frozen=True)
class _Mirrored(Strategy):
    """A round normal distribution that is drawn in mirrored pairs."""

    population: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_population(self.population)
        if self.population % 2:
            raise ValueError(f"population must be an even number (mirrored pairs), got {self.population}")

    def members(self, size: int) -> int:
        """Return the population."""
        return self.population

    def draw(self, size: int, streams: Streams) -> Tensor:
        """Draw mirrored pairs."""
        half = streams.normal(self.population // 2, size, dtype=torch.float64)
        return torch.cat([half, -half], dim=1)

    def offspring(self, state: State, draws: Tensor) -> Tensor:
        """Return mean + sigma * draws."""
        return state["mean"].unsqueeze(1) + state["sigma"].unsqueeze(2) * draws


@dataclass(frozen=True)
class RankNES(_Mirrored):
    """Natural gradients of utilities that depend on the ranks alone: any increasing change of the loss leaves it alone.

    Rank r of L members has the utility max(0, ln(L / 2 + 1) - ln r), over the sum of these, less 1 / L.

    Attributes:
        sigma: length of the first draws, as a share of the threat's radius.
        population: members of a generation, an even number.
        lr: rate of the mean.
        sigma_lr: rate of the logarithm of sigma; 0 keeps it.
    """

    lr: float = 1.0
    sigma_lr: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lr > 0:
            raise ValueError(f"lr must be > 0, got {self.lr}")
        if not self.sigma_lr >= 0:
            raise ValueError(f"sigma_lr must be >= 0, got {self.sigma_lr}")

    def start(self, unit: Tensor, size: int) -> State:
        """Return round distributions at 0."""
        return {"mean": unit.new_zeros(len(unit), size), "sigma": self.sigma * unit}

    @staticmethod
    def utilities(count: int) -> Tensor:
        """Return the utilities from the best rank to the worst: float64 (count,), with sum 0."""
        ranks = torch.arange(1, count + 1, dtype=torch.float64)
        raw = (math.log(count / 2 + 1) - ranks.log()).clamp_min(0)
        return raw / raw.sum() - 1 / count

    def update(self, state: State, draws: Tensor, loss: Tensor, generation: int) -> State:
        """Step along the natural gradient of mean and log sigma."""
        order = _best_first(loss)
        utility = torch.empty_like(loss).scatter_(1, order, self.utilities(loss.shape[1]).to(loss).expand_as(loss))
        mean = state["mean"] + self.lr * state["sigma"] * (utility.unsqueeze(1) @ draws).squeeze(1)
        growth = (utility * (draws.square().mean(dim=2) - 1)).sum(dim=1, keepdim=True)
        return {"mean": mean, "sigma": state["sigma"] * (self.sigma_lr / 2 * growth).exp()}


@dataclass(frozen=True)
class OpenAIES(_Mirrored):
    """Adam on the gradient of E[F(mean + sigma e)], which is E[e F(mean + sigma e)] / sigma, over mirrored pairs.

    Attributes:
        sigma: length of the draws, as a share of the threat's radius.
        population: members of a generation, an even number.
        lr: Adam's step size; a step of all coefficients by it is as long as the radius at 1.
    """

    sigma: float = 0.5
    lr: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lr > 0:
            raise ValueError(f"lr must be > 0, got {self.lr}")

    def start(self, unit: Tensor, size: int) -> State:
        """Return round distributions at 0, and moments of 0."""
        zeros = unit.new_zeros(len(unit), size)
        return {
            "mean": zeros,
            "sigma": self.sigma * unit,
            "unit": unit,
            "first": zeros.clone(),
            "second": zeros.clone(),
        }

    def update(self, state: State, draws: Tensor, loss: Tensor, generation: int) -> State:
        """Take one step of Adam."""
        finite = loss.nan_to_num(0.0, 0.0, 0.0).unsqueeze(1)
        sigma = torch.where(state["sigma"] > 0, state["sigma"], 1)  # 0 where the budget is 0
        gradient = (finite @ draws).squeeze(1) / (loss.shape[1] * sigma)
        first = 0.9 * state["first"] + 0.1 * gradient
        second = 0.999 * state["second"] + 0.001 * gradient.square()
        size = (second / (1 - 0.999 ** (generation + 1))).sqrt()
        step = first / (1 - 0.9 ** (generation + 1)) / torch.where(size > 0, size, 1)
        return state | {"mean": state["mean"] + self.lr * state["unit"] * step, "first": first, "second": second}


@dataclass(frozen=True)
class CMAES(Strategy):
    """Covariance matrix adaptation; it sees ranks alone, and keeps one matrix a sample.

    Attributes:
        sigma: length of the first draws, as a share of the threat's radius.
        population: members of a generation; None: 4 + floor(3 ln m) for m coefficients.
    """

    population: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.population is not None:
            _check_population(self.population)

    def members(self, size: int) -> int:
        """Return the population, by default the tutorial's."""
        return 4 + int(3 * math.log(size)) if self.population is None else self.population

    def state_bytes(self, size: int) -> int:
        """Return the bytes of a covariance matrix, its root, and what an update makes of them."""
        return 8 * (MATRICES * size**2 + VECTORS * size)

    def start(self, unit: Tensor, size: int) -> State:
        """Return round distributions at 0.

        Raises:
            ValueError: more coefficients than a covariance matrix is kept for.
        """
        if size > LARGEST_CMA:
            raise ValueError(
                f"CMA-ES keeps a covariance matrix, for at most {LARGEST_CMA} coefficients, got {size}: "
                "choose a smaller basis, such as DCT(0.1)"
            )
        return _cma_es.fresh(self.sigma * unit, size)

    def draw(self, size: int, streams: Streams) -> Tensor:
        """Draw independent members."""
        return streams.normal(self.members(size), size, dtype=torch.float64)

    def offspring(self, state: State, draws: Tensor) -> Tensor:
        """Return mean + sigma C^(1/2) z."""
        return state["mean"].unsqueeze(1) + state["sigma"].unsqueeze(2) * (draws @ state["root"])

    def update(self, state: State, draws: Tensor, loss: Tensor, generation: int) -> State:
        """Evolve by one generation."""
        constants = _cma_es.Constants(draws.shape[2], draws.shape[1])
        return _cma_es.evolve(state, draws, _best_first(loss), constants, generation)
