"""CMA-ES on a batch of searches: the update of one generation, with the standard constants.

Source: Hansen 2016, "The CMA Evolution Strategy: A Tutorial" (1604.00772), with positive recombination weights only.
Every search has its own mean m, step size s and covariance C; members are m + s C^(1/2) z with z normal. The root is
the symmetric one, B diag(D) B^T for C = B diag(D)^2 B^T, and its inverse takes a step C^(1/2) z back to z. Members
m + s B D z, as in the tutorial, have the same distribution, but they hang on the choice of eigenvectors, which rounding
decides where eigenvalues are close: a batch would not equal its samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Constants", "State", "evolve", "fresh"]

State = dict[str, Tensor]


@dataclass(frozen=True)
class Constants:
    """The strategy parameters of a search in `size` dimensions with `population` members.

    Attributes:
        size: dimensions n.
        population: members of a generation, lambda.
    """

    size: int
    population: int

    @cached_property
    def weights(self) -> Tensor:
        """Recombination weights of the best half, in descending order: float64 (mu,), with sum 1."""
        parents = self.population // 2
        ranks = torch.arange(1, parents + 1, dtype=torch.float64)
        raw = math.log(parents + 0.5) - ranks.log()
        return raw / raw.sum()

    @cached_property
    def mass(self) -> float:
        """Variance-effective number of parents, mu_eff."""
        return 1 / float(self.weights.square().sum())

    @property
    def sigma_rate(self) -> float:
        """Cumulation rate of the step-size path, c_sigma."""
        return (self.mass + 2) / (self.size + self.mass + 5)

    @property
    def damping(self) -> float:
        """Damping of the step size, d_sigma."""
        return 1 + self.sigma_rate + 2 * max(0.0, math.sqrt((self.mass - 1) / (self.size + 1)) - 1)

    @property
    def path_rate(self) -> float:
        """Cumulation rate of the covariance path, c_c."""
        return (4 + self.mass / self.size) / (self.size + 4 + 2 * self.mass / self.size)

    @property
    def rank_one(self) -> float:
        """Learning rate of the rank-one update, c_1."""
        return 2 / ((self.size + 1.3) ** 2 + self.mass)

    @property
    def rank_mu(self) -> float:
        """Learning rate of the rank-mu update, c_mu."""
        return min(1 - self.rank_one, 2 * (self.mass - 2 + 1 / self.mass) / ((self.size + 2) ** 2 + self.mass))

    @property
    def expected_norm(self) -> float:
        """The mean length of a normal vector, by the tutorial's series."""
        return math.sqrt(self.size) * (1 - 1 / (4 * self.size) + 1 / (21 * self.size**2))

    @property
    def decompose_every(self) -> int:
        """Generations between two eigendecompositions; more often would not be noticed."""
        return max(1, int(1 / (10 * self.size * (self.rank_one + self.rank_mu))))


def fresh(sigma: Tensor, size: int) -> State:
    """Return the state of searches at mean 0 with step sizes `sigma` (n, 1) and C = 1."""
    zeros = sigma.new_zeros(len(sigma), size)
    eye = torch.eye(size, dtype=sigma.dtype, device=sigma.device).expand(len(sigma), size, size)
    return {
        "mean": zeros,
        "sigma": sigma,
        "sigma_path": zeros.clone(),
        "path": zeros.clone(),
        "covariance": eye.clone(),
        "root": eye.clone(),
    }


def evolve(state: State, draws: Tensor, order: Tensor, constants: Constants, generation: int) -> State:
    """Return the next generation.

    Args:
        state: as `fresh` returns it.
        draws: the members' normal vectors z (n, lambda, size).
        order: int64 (n, lambda) the members from best to worst.
        constants: the strategy parameters.
        generation: how many came before.
    """
    k = constants
    weights = k.weights.to(draws).reshape(1, -1, 1)
    best = draws.gather(1, order[:, : weights.shape[1], None].expand(-1, -1, draws.shape[2]))
    steps = best @ state["root"]  # y = C^(1/2) z
    mean_step = (weights * steps).sum(dim=1)
    white = (weights * best).sum(dim=1)  # C^(-1/2) y_w = z_w

    gain = math.sqrt(k.sigma_rate * (2 - k.sigma_rate) * k.mass)
    sigma_path = (1 - k.sigma_rate) * state["sigma_path"] + gain * white
    length = sigma_path.norm(dim=1, keepdim=True)
    unbiased = length / math.sqrt(1 - (1 - k.sigma_rate) ** (2 * (generation + 1)))
    steady = (unbiased < (1.4 + 2 / (k.size + 1)) * k.expected_norm).to(draws.dtype)  # h_sigma
    sigma = state["sigma"] * ((k.sigma_rate / k.damping) * (length / k.expected_norm - 1)).exp()

    gain = math.sqrt(k.path_rate * (2 - k.path_rate) * k.mass)
    path = (1 - k.path_rate) * state["path"] + steady * gain * mean_step
    kept = 1 - k.rank_one - k.rank_mu + (1 - steady) * k.rank_one * k.path_rate * (2 - k.path_rate)
    covariance = (
        kept.unsqueeze(2) * state["covariance"]
        + k.rank_one * path.unsqueeze(2) * path.unsqueeze(1)
        + k.rank_mu * (weights * steps).mT @ steps
    )
    root = state["root"]
    if (generation + 1) % k.decompose_every == 0:
        values, axes = torch.linalg.eigh((covariance + covariance.mT) / 2)
        root = (axes * values.clamp_min(1e-20).sqrt().unsqueeze(1)) @ axes.mT
    return {
        "mean": state["mean"] + state["sigma"] * mean_step,
        "sigma": sigma,
        "sigma_path": sigma_path,
        "path": path,
        "covariance": covariance,
        "root": root,
    }
