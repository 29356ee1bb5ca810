"""The scales of an RBF kernel under which labels are most likely, found by GPyTorch.

GPyTorch (Gardner, Pleiss, Bindel, Weinberger and Wilson 2018, 1809.11165) comes with the extra `gp`; it is needed to
train a Gaussian process, and not to load one.
"""

from __future__ import annotations

import gpytorch
import torch
from gpytorch.constraints import GreaterThan
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from torch import Tensor

__all__ = ["likely_scales"]

NOISE_FLOOR = 1e-4  # the features of a trained net repeat themselves: without noise the matrix is singular
STEPS = 100


class _Regression(gpytorch.models.ExactGP):  # type: ignore[misc]
    """Regression on targets (C, N) at points (N, D): a process for each of the C, all with one kernel and no mean."""

    def __init__(self, points: Tensor, targets: Tensor, likelihood: GaussianLikelihood) -> None:
        super().__init__(points, targets, likelihood)
        self.mean = gpytorch.means.ZeroMean(batch_shape=targets.shape[:1])
        self.kernel = ScaleKernel(RBFKernel())

    def forward(self, points: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean(points), self.kernel(points))


def likely_scales(points: Tensor, targets: Tensor) -> Tensor:
    """Return logarithms of signal variance, length and noise variance, float64 (3,), of the largest likelihood.

    It is that of the columns of the targets (N, C) at the points (N, D), summed; L-BFGS climbs from the median distance
    of two points.
    """
    points, targets = points.double(), targets.double().mT
    likelihood = GaussianLikelihood(noise_constraint=GreaterThan(NOISE_FLOOR))
    process = _Regression(points, targets, likelihood).to(points).train()
    distances = torch.pdist(points)
    apart = distances[distances > 0]
    process.kernel.outputscale, process.likelihood.noise = 1.0, 0.1
    process.kernel.base_kernel.lengthscale = apart.median() if len(apart) else 1.0
    objective = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, process)
    solver = torch.optim.LBFGS(process.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value: Tensor = -objective(process(points), targets).sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    exact = gpytorch.settings.fast_computations(covar_root_decomposition=False, log_prob=False, solves=False)
    with torch.enable_grad(), exact:
        solver.step(loss)  # type: ignore[no-untyped-call]
    found = (process.kernel.outputscale, process.kernel.base_kernel.lengthscale.squeeze(), likelihood.noise.squeeze())
    return torch.stack([scale.detach().log() for scale in found])
