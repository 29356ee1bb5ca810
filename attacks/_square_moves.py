"""The moves of the Square attack: how it starts, and how a window changes, for each norm.

`points` and images are (n, C, H, W); `draws` are uniform numbers (n, moves.draws), those of one step for each sample.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Protocol, Self

import torch
from torch import Tensor

from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp

__all__ = ["MOVES", "Moves", "bump_pair"]

CODED_CHANNELS = 16  # with more channels a draw of signs that changes nothing is too rare to look for


class Moves(Protocol):
    """Perturbations of one norm around clean images `x`, in `threat` (the one of these rows)."""

    draws: int

    def __init__(self, x: Tensor, threat: Lp) -> None: ...

    def start(self, streams: Streams) -> Tensor:
        """Return the first points."""

    def side(self, share: float) -> int:
        """Return the side of a square window that holds about this share of the pixels."""

    def propose(self, points: Tensor, side: int, draws: Tensor) -> Tensor:
        """Return new points that differ from `points` in a random window."""

    def take(self, keep: Tensor) -> Self:
        """Return the moves of these rows."""


class LinfMoves:
    """Every entry is at an end of its interval: a window sets each channel to one of the two ends."""

    def __init__(self, x: Tensor, threat: Lp) -> None:
        reach = 2 * threat.radius(x)
        self._ends = threat.project(x - reach, x), threat.project(x + reach, x)
        self.draws = 3 + x.shape[1]

    def take(self, keep: Tensor) -> LinfMoves:
        part = object.__new__(LinfMoves)
        part._ends, part.draws = (self._ends[0][keep], self._ends[1][keep]), self.draws
        return part

    def start(self, streams: Streams) -> Tensor:
        """Vertical stripes, one pixel wide, with a sign for each channel."""
        low, high = self._ends
        up = streams.uniform(low.shape[1], 1, low.shape[3]) < 0.5
        return torch.where(up, high, low)

    def side(self, share: float) -> int:
        height, width = self._ends[0].shape[2:]
        return min(max(round(math.sqrt(share * height * width)), 1), height, width)

    def propose(self, points: Tensor, side: int, draws: Tensor) -> Tensor:
        """Give each channel of the window a random sign; signs that change nothing are drawn again."""
        window = _window(points, side, draws[:, 0], draws[:, 1])
        low, high = (end.flatten(2).gather(2, window) for end in self._ends)
        up = draws[:, 3:, None] < 0.5
        same = torch.where(up, high, low) == points.flatten(2).gather(2, window)
        up = up ^ (_some_channels(draws[:, 2], points.shape[1]) & same.all(dim=2).all(dim=1)[:, None, None])
        return points.flatten(2).scatter(2, window, torch.where(up, high, low)).reshape(points.shape)


class L2Moves:
    """The change has length eps: a window takes over what another one held, in the shape of two opposite bumps."""

    def __init__(self, x: Tensor, threat: Lp) -> None:
        self._x, self._threat = x, threat
        self.draws = 5 + x.shape[1]

    def take(self, keep: Tensor) -> L2Moves:
        return L2Moves(self._x[keep], self._threat.take(keep))

    def start(self, streams: Streams) -> Tensor:
        """Return a grid of bump pairs, five along the shorter side."""
        n, channels, height, width = self._x.shape
        side = max(min(height, width) // 5, 1)
        down, across = height // side, width // side
        draws = streams.uniform(1 + channels, down, across)
        tiles = _turned(bump_pair(side, self._x.dtype, self._x.device), draws[:, 0]).unsqueeze(1)
        tiles = tiles * _signs(draws[:, 1:, :, :, None, None], self._x.dtype)
        grid = tiles.transpose(3, 4).reshape(n, channels, down * side, across * side)
        delta = torch.zeros_like(self._x)
        top, left = (height - down * side) // 2, (width - across * side) // 2
        delta[:, :, top : top + down * side, left : left + across * side] = grid
        return self._at_radius(delta)

    def side(self, share: float) -> int:
        height, width = self._x.shape[2:]
        side = max(round(math.sqrt(share * height * width)), 3)
        return min(side + (side + 1) % 2, height, width)

    def propose(self, points: Tensor, side: int, draws: Tensor) -> Tensor:
        """Move the mass of a second window, and what clipping left unused, into the first one, channel by channel."""
        first = _window(points, side, draws[:, 0], draws[:, 1])
        second = _window(points, side, draws[:, 2], draws[:, 3])
        delta = (points - self._x).flatten(2)
        cleared = delta.scatter(2, first, 0).scatter(2, second, 0)
        held = (delta - cleared).square().sum(dim=2, keepdim=True)
        squares = delta.square().sum(dim=(1, 2)).reshape(-1, 1, 1)
        unused = (self._threat.radius(points).flatten(2).square() - squares).clamp_min(0) / points.shape[1]
        shape = _turned(bump_pair(side, points.dtype, points.device), draws[:, 4]).flatten(1).unsqueeze(1)
        fresh = shape * _signs(draws[:, 5:, None], points.dtype) + _unit(delta.gather(2, first))
        fresh = _unit(fresh) * (held + unused).sqrt()
        return self._at_radius(cleared.scatter(2, first, fresh).reshape(points.shape))

    def _at_radius(self, delta: Tensor) -> Tensor:
        length = delta.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1).clamp_min(1e-12)
        return self._threat.project(self._x + delta * (self._threat.radius(delta) / length), self._x)


MOVES: dict[str, type[Moves]] = {"linf": LinfMoves, "l2": L2Moves}


def _window(images: Tensor, side: int, down: Tensor, across: Tensor) -> Tensor:
    """Return flat pixel positions, int64 (n, C, side * side), of windows at uniform places (all that fit)."""
    height, width = images.shape[2:]
    top, left = ((u * (size - side + 1)).long().clamp_max(size - side) for u, size in ((down, height), (across, width)))
    steps = torch.arange(side, device=images.device)
    corner = (top * width + left).reshape(-1, 1, 1)
    flat = (corner + (steps[:, None] * width + steps).reshape(1, 1, -1)).expand(-1, images.shape[1], -1)
    return flat


def _some_channels(draw: Tensor, channels: int) -> Tensor:
    """Return bool (n, C, 1): a uniform choice among the sets of channels that are not empty."""
    count = min(channels, CODED_CHANNELS)
    code = (1 + (draw * (2**count - 1)).long()).clamp_max(2**count - 1)
    bits = torch.arange(channels, device=draw.device)
    return (((code[:, None] >> bits.clamp_max(count)) & 1) == 1).unsqueeze(2)


def _signs(draws: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(draws < 0.5, -1.0, 1.0).to(dtype)


def _unit(rows: Tensor) -> Tensor:
    length = rows.square().sum(dim=2, keepdim=True).sqrt()
    return rows / length.clamp_min(1e-12)


def _turned(shape: Tensor, draws: Tensor) -> Tensor:
    """Return `shape` (s, s), transposed where the draw (...) says so: (..., s, s)."""
    return torch.where(draws[..., None, None] < 0.5, shape, shape.T)


@lru_cache(maxsize=64)
def bump_pair(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return two bumps of opposite sign, one above the other, (side, side) of l2 norm 1."""
    halves = [_bump(side // 2, side), -_bump(side - side // 2, side)]
    pair = torch.cat(halves)
    return (pair / pair.norm()).to(dtype=dtype, device=device)


def _bump(height: int, width: int) -> Tensor:
    """Return a bump (height, width) of norm 1: sum of 1 / (k + 1)^2 over the squares k = 0, 1, ... around its centre.

    Square k holds the entries at most k rows and columns from the centre; the last one holds the rectangle.
    """
    rows, columns = (torch.arange(size, dtype=torch.float64) - size // 2 for size in (height, width))
    ring = torch.maximum(rows.abs()[:, None], columns.abs()).long()
    weights = 1 / torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float64).square()
    bump = weights.flip(0).cumsum(0).flip(0)[ring]
    return bump / bump.norm() if height else bump
