"""Second-order attacks: where the gradient vanishes or misleads, the loss around the point still says where to go.

Threat: linf, l2, l1. Access: gradients.
Source: Li, Chen, Wang and Carin 2018, "Certified Adversarial Robustness with Additive Gaussian Noise" (1809.03113,
first named "Second-Order Adversarial Attack and Certifiable Robustness"). Their attack adds up gradients at Gaussian
copies of the point, which is gradient ascent on the smoothed loss and uses no Hessian; `PowerIteration` is the attack
that their derivation asks for, along the Hessian's top eigenvector.
Departures: steps of 2 eps / steps on the cross-entropy in every norm (in l2 the original takes 2.5 eps / steps on the
margin); every iterate is projected (the original clips to the image bounds at the end only), each sample keeps its
best one and leaves at its first success. The default noise is the original's for MNIST; for CIFAR-10 it has 100/255.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustbench_lite.attacks.iterative import Ascent, Estimator, IterativeAttack
from robustbench_lite.core.checks import parse_number
from robustbench_lite.core.losses import Loss, loss_named
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams

__all__ = ["NoiseAveraged", "PowerIteration", "SecondOrder"]


@dataclass(frozen=True)
class NoiseAveraged:
    """The mean gradient at Gaussian copies of each point.

    Attributes:
        samples: copies.
        sigma: standard deviation of the noise, in the units of the images; the default is for bounds (0, 1).

    Raises:
        ValueError: no sample, or a sigma that is not positive.
    """

    samples: int = 10
    sigma: float | str = 0.7

    def __post_init__(self) -> None:
        if not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(f"samples must be a whole number, at least 1, got {self.samples!r}")
        if not parse_number(self.sigma) > 0:
            raise ValueError(f"sigma must be > 0, got {self.sigma}; for pixel units write '100/255'")

    @property
    def access(self) -> Access:
        """Gradients."""
        return Access.GRADIENT

    def cost(self, oracle: Oracle) -> int:
        """Return the forward passes of one call."""
        return oracle.judge_cost + self.samples * oracle.probe_cost

    def __call__(self, oracle: Oracle, points: Tensor, rows: Tensor, loss: Loss, streams: Streams) -> Tensor:
        """Return the mean gradient (n, C, H, W), 0 for samples that fall at the point itself."""
        oracle.judge(points, rows, loss)
        keep = oracle.still(rows, self.samples * oracle.probe_cost)
        total = torch.zeros_like(points)
        if len(keep) == 0:
            return total
        chosen, owners, own = points[keep], rows[keep], streams.take(keep)
        for _ in range(self.samples):
            noise = parse_number(self.sigma) * own.normal(*points.shape[1:], dtype=points.dtype)
            _, slope = oracle.gradient(chosen + noise, owners, loss, candidate=False)
            total.index_add_(0, keep, slope / self.samples)
        return total


@dataclass(frozen=True)
class PowerIteration:
    """The direction in which the loss curves up most: the top eigenvector of its Hessian, by power iteration.

    Power iteration finds the eigenvalue of largest size. Where that is negative, it goes on with the Hessian shifted by
    it, which makes the largest eigenvalue the one that is found. Of the two directions the one along the gradient is
    taken. Where the Hessian is zero (a margin of a piecewise-linear net), the gradient itself is the answer.

    Attributes:
        iterations: products with the Hessian, half of them for the shift.

    Raises:
        ValueError: fewer than 2 iterations.
    """

    iterations: int = 10

    def __post_init__(self) -> None:
        if not isinstance(self.iterations, int) or self.iterations < 2:
            raise ValueError(f"iterations must be a whole number, at least 2, got {self.iterations!r}")

    @property
    def access(self) -> Access:
        """Gradients."""
        return Access.GRADIENT

    def cost(self, oracle: Oracle) -> int:
        """Return the forward passes of one call."""
        return oracle.gradient_cost + self.iterations * oracle.probe_cost

    def __call__(self, oracle: Oracle, points: Tensor, rows: Tensor, loss: Loss, streams: Streams) -> Tensor:
        """Return the direction (n, C, H, W), of length 1 where it is an eigenvector."""
        _, gradient = oracle.gradient(points, rows, loss)
        keep = oracle.still(rows, self.iterations * oracle.probe_cost)
        if len(keep):
            vector = self._eigenvector(oracle, points[keep], rows[keep], loss, streams.take(keep))
            along = (vector * gradient[keep]).sum(dim=(1, 2, 3), keepdim=True)
            curved = vector.flatten(1).any(dim=1).reshape(-1, 1, 1, 1)
            chosen = torch.where(curved, torch.where(along < 0, -vector, vector), gradient[keep])
            gradient = gradient.index_copy(0, keep, chosen)  # not in place: autograd may hand out an expanded tensor
        return gradient

    def _eigenvector(self, oracle: Oracle, points: Tensor, rows: Tensor, loss: Loss, streams: Streams) -> Tensor:
        vector = _unit(streams.normal(*points.shape[1:], dtype=points.dtype))
        shift = torch.zeros(len(points), 1, 1, 1, dtype=points.dtype, device=points.device)
        for step in range(self.iterations):
            product = oracle.curvature(points, rows, loss, vector)
            if step == self.iterations // 2:
                shift = (product * vector).sum(dim=(1, 2, 3), keepdim=True).clamp_max(0)
            flat = ~product.flatten(1).any(dim=1).reshape(-1, 1, 1, 1)
            vector = torch.where(flat, 0, _unit(product - shift * vector))
        return vector


def _unit(vector: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(vector.flatten(1), dim=1).reshape(-1, 1, 1, 1)
    return vector / torch.where(length > 0, length, 1)


@dataclass(frozen=True)
class SecondOrder(IterativeAttack):
    """Ascent on the loss around each point.

    Attributes:
        steps: steps of the ascent.
        step_size: length of a step in the units of the images; None: `2 * eps / steps`, the original's eps / 10 at 20.
        estimator: `NoiseAveraged`, the paper's, or `PowerIteration`.
        loss: "ce", "margin" or "dlr".
        density: for l1, the share of the coordinates that a step moves.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    steps: int = 20
    step_size: float | str | None = None
    estimator: Estimator = field(default_factory=NoiseAveraged)
    loss: str = "ce"
    density: float = 0.05

    def ascent(self) -> Ascent:
        """Return the ascent that this attack runs."""
        return Ascent(
            loss_named(self.loss), self.steps, 2.0, self.step_size, density=self.density, estimator=self.estimator
        )
