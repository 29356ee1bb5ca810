"""The scales of an RBF kernel under which labels are most likely, found with GPyTorch.

GPyTorch (Gardner, Pleiss, Bindel, Weinberger and Wilson 2018, 1809.11165) comes with the extra `gp`; it is needed to
fit a Gaussian process, and not to load one.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*torch.jit", category=FutureWarning)  # GPyTorch scripts a function
    import gpytorch
    from gpytorch.constraints import GreaterThan

__all__ = ["likely_scales"]

NOISE_FLOOR = 1e-4  # of the signal variance: features of a trained net repeat themselves, and K alone is singular
LENGTH_FLOOR = 1e-3  # of the median distance: the line search tries extreme values
STEPS = 100


def likely_scales(points: Tensor, targets: Tensor) -> Tensor:
    """Return logarithms of signal variance s_f^2, length and noise variance, float64 (3,), of the largest likelihood.

    It is the likelihood of the columns of the targets (N, C) at the points (N, D), summed, each a process with the same
    kernel and no mean. For a given length and noise, in units of s_f^2, the best s_f^2 is y^T K^-1 y / (N C); L-BFGS
    finds these two, from the median distance of two points and a tenth.
    """
    points, targets = points.double(), targets.double()
    apart = torch.pdist(points)
    apart = apart[apart > 0]
    unit = apart.median() if len(apart) else points.new_ones(())
    kernel = gpytorch.kernels.RBFKernel(lengthscale_constraint=GreaterThan(LENGTH_FLOOR)).to(points)
    likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=GreaterThan(NOISE_FLOOR)).to(points)
    kernel.lengthscale, likelihood.noise = 1.0, 0.1
    solver = torch.optim.LBFGS(
        [*kernel.parameters(), *likelihood.parameters()], max_iter=STEPS, line_search_fn="strong_wolfe"
    )

    def signal_and_determinant() -> tuple[Tensor, Tensor]:
        matrix = kernel(points / unit).add_diagonal(likelihood.noise)
        square, determinant = matrix.inv_quad_logdet(inv_quad_rhs=targets, logdet=True)
        return square / targets.numel(), determinant

    def loss() -> Tensor:
        solver.zero_grad()
        signal, determinant = signal_and_determinant()
        value: Tensor = (signal.log() + determinant / len(points)) / 2
        value.backward()  # type: ignore[no-untyped-call]
        return value

    exact = gpytorch.settings.fast_computations(covar_root_decomposition=False, log_prob=False, solves=False)
    with torch.enable_grad(), exact:
        solver.step(loss)  # type: ignore[no-untyped-call]
        signal = signal_and_determinant()[0].detach()
    length, noise = kernel.lengthscale.detach().squeeze() * unit, likelihood.noise.detach().squeeze() * signal
    return torch.stack([signal, length, noise]).log()
