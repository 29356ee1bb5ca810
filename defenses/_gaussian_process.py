"""Exact Gaussian-process regression with an RBF kernel, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["condition", "fit_scales", "kernel", "log_marginal_likelihood", "posterior"]

JITTER = 1e-8  # times the signal variance, for the factorisation alone
NOISE_FLOOR = 1e-4  # of the signal variance: the features of a trained net repeat themselves


def kernel(a: Tensor, b: Tensor, scales: Tensor) -> Tensor:
    """Return s_f^2 exp(-||a - b||^2 / (2 l^2)), (N, M), of points (N, D) and (M, D).

    `scales` are the logarithms of signal variance s_f^2, length l and noise variance s^2, (3,).
    """
    square = a.square().sum(dim=1, keepdim=True) + b.square().sum(dim=1) - 2 * a @ b.mT
    return torch.exp(scales[0] - square.clamp_min(0) / (2 * torch.exp(2 * scales[1])))


def _factor(points: Tensor, scales: Tensor) -> Tensor:
    noise = torch.exp(scales[2]) + JITTER * torch.exp(scales[0])
    eye = torch.eye(len(points), dtype=points.dtype, device=points.device)
    root: Tensor = torch.linalg.cholesky(kernel(points, points, scales) + noise * eye)
    return root


def condition(points: Tensor, targets: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return (K + s^2 I)^-1 y, (N, C), and R with R R^T = (K + s^2 I)^-1, (N, N); targets are (N, C)."""
    root = _factor(points, scales)
    eye = torch.eye(len(points), dtype=points.dtype, device=points.device)
    inverse_root = torch.linalg.solve_triangular(root, eye, upper=False).mT
    return torch.cholesky_solve(targets, root), inverse_root


def posterior(
    x: Tensor, points: Tensor, weights: Tensor, inverse_root: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Return means k^T (K + s^2 I)^-1 y, (B, C), and variances k(x, x) - k^T (K + s^2 I)^-1 k, (B,), of points (B, D).

    `weights` and `inverse_root` are what `condition` returns. The variance is that of the function, without noise.
    """
    across = kernel(x, points, scales)
    variance = torch.exp(scales[0]) - (across @ inverse_root).square().sum(dim=1)
    return across @ weights, variance.clamp_min(torch.finfo(x.dtype).tiny)


def log_marginal_likelihood(points: Tensor, targets: Tensor, scales: Tensor) -> Tensor:
    """Return the sum over the columns of the targets (N, C) of log p(y | points), a scalar."""
    count, columns = targets.shape
    root = _factor(points, scales)
    white = torch.linalg.solve_triangular(root, targets, upper=False)
    determinant = 2 * root.diagonal().log().sum()
    value: Tensor = -0.5 * (white.square().sum() + columns * (determinant + count * math.log(2 * math.pi)))
    return value


def fit_scales(points: Tensor, targets: Tensor, steps: int = 100) -> Tensor:
    """Return the `scales` (3,) of the largest marginal likelihood, found by L-BFGS from the median distance."""
    distances = torch.pdist(points)
    length = distances[distances > 0].median() if bool((distances > 0).any()) else points.new_ones(())
    start = torch.stack([points.new_zeros(()), length.log(), points.new_tensor(math.log(0.1))])
    scales = start.clone().requires_grad_()
    solver = torch.optim.LBFGS([scales], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = -log_marginal_likelihood(points, targets, bounded(scales, start)) / targets.numel()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        solver.step(loss)  # type: ignore[no-untyped-call]
    return bounded(scales.detach(), start)


def bounded(scales: Tensor, start: Tensor) -> Tensor:
    """Return the scales kept where the kernel matrix can be factorised: at most e^6 from the start, noise >= a floor.

    A smooth bound: beyond a hard one the line search would meet a zero gradient.
    """
    near = start + 6 * torch.tanh((scales - start) / 6)
    noise = torch.logaddexp(near[2], near[0] + math.log(NOISE_FLOOR))
    return torch.stack([near[0], near[1], noise])
