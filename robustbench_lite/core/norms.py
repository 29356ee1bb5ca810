"""Geometry of the Lp balls: sizes, projections, uniform points, steepest directions. One small class a norm.

All tensors are batches (B, C, H, W); `eps` is broadcastable, (B, 1, 1, 1). Displacements live in a box [low, high]
that contains 0 (the image bounds seen from the clean image).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from robustbench_lite.core.rng import Streams

__all__ = ["L0_BY_COORDINATE", "NORMS", "Norm", "stuck"]


def stuck(points: Tensor, gradient: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Say which entries lie at an image bound with a gradient that points out of it: they cannot move up it."""
    return ((points <= bounds[0]) & (gradient < 0)) | ((points >= bounds[1]) & (gradient > 0))


class Norm(Protocol):
    """What a threat asks of a norm."""

    dual: str

    def size(self, d: Tensor) -> Tensor:
        """Return the norm (B,) of displacements."""

    def project(self, d: Tensor, eps: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return a point of the ball and the box near `d`."""

    def random(self, like: Tensor, eps: Tensor, low: Tensor, high: Tensor, streams: Streams) -> Tensor:
        """Return a uniform point of the ball, cut to the box."""

    def steepest(self, gradient: Tensor, density: float | None) -> Tensor:
        """Return the maximiser of <d, gradient> over the unit ball (0 where the gradient is 0)."""


def _rows(d: Tensor) -> Tensor:
    return d.flatten(1)


class _Linf:
    dual = "l1"

    def size(self, d: Tensor) -> Tensor:
        return _rows(d).abs().amax(dim=1)

    def project(self, d: Tensor, eps: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return d.clamp(-eps, eps).clamp(low, high)

    def random(self, like: Tensor, eps: Tensor, low: Tensor, high: Tensor, streams: Streams) -> Tensor:
        return (eps * (2 * streams.uniform(*like.shape[1:], dtype=like.dtype) - 1)).clamp(low, high)

    def steepest(self, gradient: Tensor, density: float | None) -> Tensor:
        return gradient.sign()


class _L2:
    dual = "l2"

    def size(self, d: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(_rows(d), dim=1)
        return length

    def project(self, d: Tensor, eps: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Project exactly on ball and box: clip(t d), with t in [0, 1] as large as the ball allows.

        ||clip(t d)|| grows with t. Solving for t with the clipped set held fixed gives a larger t that is still
        feasible, so the iteration rises to the solution and may stop anywhere; the sets rarely change five times.
        """
        size, room = d.abs(), torch.where(d > 0, high, -low).clamp_min(0)
        scale = self._factor(eps.square(), size.square())
        for _ in range(16):
            clipped = scale * size >= room
            left = eps.square() - (room.square() * clipped).sum(dim=(1, 2, 3), keepdim=True)
            larger = torch.maximum(scale, self._factor(left.clamp_min(0), size.square() * ~clipped))
            if d.device.type == "cpu" and torch.equal(larger, scale):
                break
            scale = larger
        return (d * scale).clamp(low, high)

    @staticmethod
    def _factor(budget: Tensor, squares: Tensor) -> Tensor:
        """Return t in [0, 1] with t^2 * sum(squares) = budget, or 1 where that asks for more."""
        return (budget / squares.sum(dim=(1, 2, 3), keepdim=True).clamp_min(1e-30)).clamp_max(1).sqrt()

    def random(self, like: Tensor, eps: Tensor, low: Tensor, high: Tensor, streams: Streams) -> Tensor:
        direction = self.steepest(streams.normal(*like.shape[1:], dtype=like.dtype), None)
        radius = streams.uniform(1, 1, 1, dtype=like.dtype) ** (1 / like.shape[1:].numel())
        return (eps * radius * direction).clamp(low, high)

    def steepest(self, gradient: Tensor, density: float | None) -> Tensor:
        # The largest entry is divided out first: squares of tiny gradients underflow in float32.
        top = gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
        scaled = gradient / torch.where(top > 0, top, 1)
        length = self.size(scaled).reshape(-1, 1, 1, 1)
        return scaled / torch.where(length > 0, length, 1)


class _L1:
    dual = "linf"

    def size(self, d: Tensor) -> Tensor:
        return _rows(d).abs().sum(dim=1)

    def project(self, d: Tensor, eps: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Project exactly on ball and box: soft threshold by the lambda >= 0 at which the clipped sum is eps.

        With m = |d| and c the room on d's side, lambda solves sum_i min(max(m_i - lambda, 0), c_i) = eps. The left
        side is piecewise linear with breakpoints m_i (slope begins) and m_i - c_i (slope ends), so sorting the
        breakpoints finds lambda exactly (Croce and Hein 2021, 2103.01208, treat the same problem).
        """
        if d.numel() == 0:
            return d
        size, room = _rows(d.abs()), _rows(torch.where(d > 0, high.expand_as(d), -low.expand_as(d))).clamp_min(0)
        radius = eps.expand(len(d), 1, 1, 1).reshape(-1, 1)
        inside = torch.minimum(size, room).sum(dim=1, keepdim=True) <= radius
        threshold = torch.where(inside, 0, _l1_threshold(size, room, radius)).reshape(-1, 1, 1, 1)
        return (d.sign() * (d.abs() - threshold).clamp_min(0)).clamp(low, high)

    def random(self, like: Tensor, eps: Tensor, low: Tensor, high: Tensor, streams: Streams) -> Tensor:
        # d Laplace variables over their l1 norm plus one more exponential: uniform in the ball
        # (Barthe, Guedon, Mendelson and Naor 2005, math/0503650).
        shape = like.shape[1:]
        uniform = streams.uniform(*shape, dtype=like.dtype)
        laplace = -torch.log1p(-uniform) * torch.where(streams.uniform(*shape, dtype=like.dtype) < 0.5, -1.0, 1.0)
        extra = -torch.log1p(-streams.uniform(1, 1, 1, dtype=like.dtype))
        return (eps * laplace / (self.size(laplace).reshape(-1, 1, 1, 1) + extra)).clamp(low, high)

    def steepest(self, gradient: Tensor, density: float | None) -> Tensor:
        """All weight on the largest entry; with `density`, evenly on that share of the largest entries.

        The sparse form is the step of SLIDE (Tramer and Boneh 2019, 1904.13000).
        """
        rows = _rows(gradient)
        count = 1 if density is None else max(1, round(density * rows.shape[1]))
        chosen = rows.abs().topk(count, dim=1).indices
        signs = rows.gather(1, chosen).sign()
        weights = signs / signs.abs().sum(dim=1, keepdim=True).clamp_min(1)
        return torch.zeros_like(rows).scatter_(1, chosen, weights).reshape(gradient.shape)


class _L0:
    """Counts pixels: a pixel has moved when any of its channels has."""

    dual = "l0"

    def size(self, d: Tensor) -> Tensor:
        return (d != 0).any(dim=1).flatten(1).sum(dim=1).to(d.dtype)

    def project(self, d: Tensor, eps: Tensor, low: Tensor, high: Tensor) -> Tensor:
        # Exact: cut to the box, then keep the pixels whose removal would cost most, |d|^2 - |d - cut|^2.
        cut = d.clamp(low, high)
        return cut * self._top(((2 * d - cut) * cut).sum(dim=1), eps)

    def random(self, like: Tensor, eps: Tensor, low: Tensor, high: Tensor, streams: Streams) -> Tensor:
        shape = like.shape[1:]
        where = self._top(streams.uniform(*shape[1:], dtype=like.dtype), eps)
        return (low + (high - low) * streams.uniform(*shape, dtype=like.dtype)) * where

    def steepest(self, gradient: Tensor, density: float | None) -> Tensor:
        raise ValueError("l0 has no steepest direction: its unit ball is not bounded")

    @staticmethod
    def _top(score: Tensor, eps: Tensor) -> Tensor:
        """Mask (B, 1, H, W) of the floor(eps) pixels with the largest positive score, the first ones in a tie."""
        rank = score.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        keep = (rank < eps.reshape(-1, 1).floor()) & (score.flatten(1) > 0)
        return keep.reshape(len(score), 1, *score.shape[1:]).to(score.dtype)


def _l1_threshold(size: Tensor, room: Tensor, radius: Tensor) -> Tensor:
    """Return lambda (B, 1) with sum min(max(size - lambda, 0), room) = radius, for rows where lambda = 0 gives more."""
    points = torch.cat([size, size - room], dim=1)
    slopes = torch.cat([torch.ones_like(size), -torch.ones_like(room)], dim=1)
    points, order = points.sort(dim=1, descending=True)
    slope = slopes.gather(1, order).cumsum(dim=1)  # active coordinates just below each breakpoint
    gaps = torch.cat([torch.zeros_like(points[:, :1]), points[:, :-1] - points[:, 1:]], dim=1)
    before = torch.cat([torch.zeros_like(slope[:, :1]), slope[:, :-1]], dim=1)
    total = (gaps * before).cumsum(dim=1)  # the clipped sum at lambda = this breakpoint
    last = (total <= radius).sum(dim=1, keepdim=True).clamp_min(1) - 1  # the sum passes radius below this one
    missing = radius - total.gather(1, last)
    return (points.gather(1, last) - missing / slope.gather(1, last).clamp_min(1)).clamp_min(0)


class _L0Coordinate(_L0):
    """Counts coordinates: each channel of each pixel is a pixel of its own."""

    def size(self, d: Tensor) -> Tensor:
        return super().size(_columns(d))

    def project(self, d: Tensor, eps: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return super().project(_columns(d), eps, _columns(low), _columns(high)).reshape(d.shape)

    def random(self, like: Tensor, eps: Tensor, low: Tensor, high: Tensor, streams: Streams) -> Tensor:
        return super().random(_columns(like), eps, _columns(low), _columns(high), streams).reshape(like.shape)


def _columns(d: Tensor) -> Tensor:
    """Return (B, C, H, W) as (B, 1, CHW, 1): one channel, one coordinate a pixel."""
    return d.reshape(len(d), 1, d.shape[1:].numel(), 1)


NORMS: dict[str, Norm] = {"linf": _Linf(), "l2": _L2(), "l1": _L1(), "l0": _L0()}
L0_BY_COORDINATE: Norm = _L0Coordinate()
