"""Exact Gaussian-process regression with an RBF kernel, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["condition", "kernel", "posterior"]

JITTER = 1e-8  # times the signal variance, for the factorisation alone


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
