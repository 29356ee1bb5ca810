"""The moves of the Square attack: how it starts, and how a window changes, for each norm.

Images and points are (n, C, H, W); `draws` are uniform numbers (n, moves.draws), one row a sample.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from copy import copy
from functools import lru_cache
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from robustbench_lite.core.rng import Streams
from robustbench_lite.core.rows import pick
from robustbench_lite.core.threats import Lp

__all__ = ["MOVES", "Moves", "bump_pair"]

CODED_CHANNELS = 16  # with more channels a draw of signs that changes nothing is too rare to look for
FILLS = 3  # rounds of clipping and lengthening


class Moves(Protocol):
    """A perturbation of each clean image in `x`, within `threat` (the one of these rows), and how to change it.

    Attributes:
        points: the current points.
        draws: uniform numbers that one change needs, for each sample.
    """

    points: Tensor
    draws: int

    def __init__(self, x: Tensor, threat: Lp, streams: Streams) -> None: ...

    def side(self, share: float) -> int:
        """Return the side of a square window that holds about this share of the pixels."""

    def plan(self, sides: list[int], draws: Tensor) -> None:
        """Take in the sides of the next windows, and the draws (n, len(sides), self.draws) that place and fill them."""

    def change(self, step: int) -> Tensor:
        """Return points that differ from the current ones in window `step` of the plan; valid until `settle`."""

    def settle(self, better: Tensor) -> None:
        """Keep the change where `better`, bool (n,), says so, and take it back elsewhere."""

    def take(self, keep: Tensor) -> Self:
        """Return the moves of these rows."""


class LinfMoves:
    """Every entry is at an end of its interval: a window sets each channel to one of the two ends."""

    def __init__(self, x: Tensor, threat: Lp, streams: Streams) -> None:
        """Start from vertical stripes, one pixel wide, with a sign for each channel."""
        reach = 2 * threat.radius(x)
        # (n, 2, C, H * W): the lower and the upper end of each entry.
        self._ends = torch.stack([threat.project(x - reach, x), threat.project(x + reach, x)], dim=1).flatten(3)
        up = streams.uniform(x.shape[1], 1, x.shape[3]) < 0.5
        self.points = torch.where(up, self._ends[:, 1].view(x.shape), self._ends[:, 0].view(x.shape)).contiguous()
        self.draws = 3 + x.shape[1]
        self.plan([], x.new_empty(len(x), 0, self.draws))

    def take(self, keep: Tensor) -> LinfMoves:
        part = copy(self)
        part._ends, part.points = self._ends.index_select(0, keep), self.points.index_select(0, keep)
        part._corners, part._up, part._flips = (t.index_select(1, keep) for t in (self._corners, self._up, self._flips))
        return part

    def side(self, share: float) -> int:
        height, width = self.points.shape[2:]
        return min(max(round(math.sqrt(share * height * width)), 1), height, width)

    def plan(self, sides: list[int], draws: Tensor) -> None:
        """Place all windows, and give each channel a random sign, and other signs in case these change nothing."""
        draws = draws.transpose(0, 1)
        lengths = torch.tensor(sides, dtype=torch.int64, device=draws.device).unsqueeze(1)
        self._sides = sides
        self._corners = _corners(self.points, lengths, draws[..., 0], draws[..., 1])
        self._up = draws[..., 3:, None] < 0.5
        self._flips = _some_channels(draws[..., 2], self.points.shape[1])

    def change(self, step: int) -> Tensor:
        """Set each channel of the window to one of the ends, in place."""
        n, channels = self.points.shape[:2]
        window = _window(self.points, self._sides[step], self._corners[step])
        low, high = self._ends.gather(3, window[:, None].expand(n, 2, channels, -1)).unbind(dim=1)
        flat, up = self.points.view(n, channels, -1), self._up[step]
        old = flat.gather(2, window)
        idle = (torch.where(up, high, low) == old).flatten(1).all(dim=1)
        new = torch.where(up ^ (self._flips[step] & idle[:, None, None]), high, low)
        flat.scatter_(2, window, new)
        self._undo = window, old, new
        return self.points

    def settle(self, better: Tensor) -> None:
        window, old, new = self._undo
        self.points.flatten(2).scatter_(2, window, torch.where(better[:, None, None], new, old))


class BumpMoves(ABC):
    """The change has length eps: a window takes over what another one held, in the shape of two opposite bumps."""

    order: ClassVar[int]

    def __init__(self, x: Tensor, threat: Lp, streams: Streams) -> None:
        """Start from a grid of bump pairs, five along the shorter side."""
        self._x, self._threat, self._radius = x, threat, threat.radius(x).expand(len(x), 1, 1, 1)
        self.draws = 5 + x.shape[1]
        self.plan([], x.new_empty(len(x), 0, self.draws))
        n, channels, height, width = x.shape
        side = max(min(height, width) // 5, 1)
        down, across = height // side, width // side
        draws = streams.uniform(1 + channels, down, across)
        tiles = _turned(self._pair(side), draws[:, 0]).unsqueeze(1)
        tiles = tiles * _signs(draws[:, 1:, :, :, None, None], x.dtype)
        grid = tiles.transpose(3, 4).reshape(n, channels, down * side, across * side)
        delta = torch.zeros_like(x)
        top, left = (height - down * side) // 2, (width - across * side) // 2
        delta[:, :, top : top + down * side, left : left + across * side] = grid
        self.points = self._at_radius(delta)

    def take(self, keep: Tensor) -> Self:
        part = copy(self)
        part._x, part._radius, part.points, part._draws = (
            t.index_select(0, keep) for t in (self._x, self._radius, self.points, self._draws)
        )
        part._threat = self._threat.take(keep)
        return part

    def side(self, share: float) -> int:
        height, width = self._x.shape[2:]
        side = max(round(math.sqrt(share * height * width)), 3)
        return min(side + (side + 1) % 2, height, width)

    def plan(self, sides: list[int], draws: Tensor) -> None:
        self._sides, self._draws = sides, draws

    def change(self, step: int) -> Tensor:
        """Move the mass of a second window, and what clipping left unused, into the first one, channel by channel."""
        side, draws = self._sides[step], self._draws[:, step]
        first, second = (
            _window(self.points, side, _corners(self.points, side, draws[:, i], draws[:, i + 1])) for i in (0, 2)
        )
        delta = (self.points - self._x).flatten(2)
        cleared = delta.scatter(2, first, 0).scatter_(2, second, 0)
        held, kept = (self._mass(t).sum(dim=2, keepdim=True) for t in (delta, cleared))
        unused = (self._mass(self._radius.flatten(2)) - held.sum(dim=1, keepdim=True)).clamp_min(0) / delta.shape[1]
        shape = _turned(self._pair(side), draws[:, 4]).flatten(1).unsqueeze(1)
        fresh = shape * _signs(draws[:, 5:, None], delta.dtype) + self._unit(delta.gather(2, first))
        fresh = self.gain * self._unit(fresh) * self._length((held - kept).clamp_min(0) + unused)
        self._changed = self._at_radius(cleared.scatter_(2, first, fresh).reshape(self.points.shape))
        return self._changed

    def settle(self, better: Tensor) -> None:
        self.points = pick(better, self._changed, self.points)

    @property
    @abstractmethod
    def gain(self) -> float:
        """How many times the mass that it takes over a window receives."""

    @abstractmethod
    def _at_radius(self, delta: Tensor) -> Tensor:
        """Return points at distance eps along `delta`, as far as the image bounds allow."""

    def _mass(self, entries: Tensor) -> Tensor:
        return entries.abs().pow(self.order)

    def _length(self, mass: Tensor) -> Tensor:
        return mass.pow(1 / self.order)

    def _pair(self, side: int) -> Tensor:
        return bump_pair(side, self._x.dtype, self._x.device, self.order)

    def _unit(self, rows: Tensor) -> Tensor:
        return rows / self._length(self._mass(rows).sum(dim=2, keepdim=True)).clamp_min(1e-12)


class L2Moves(BumpMoves):
    """Lengths are Euclidean."""

    order = 2
    gain = 1

    def _at_radius(self, delta: Tensor) -> Tensor:
        """Return points at distance eps along `delta`, as far as the image bounds allow.

        Clipping shortens the change, on black images by half its mass; lengthening it again, `FILLS` times, doubled the
        share of MNIST images that fall to l2 2.0 on an adversarially trained net in 500 queries.
        """
        # A few ulp short of eps: the oracle drops points that rounding puts outside.
        radius = self._radius * (1 - 8 * torch.finfo(delta.dtype).eps)
        low, high = self._threat.bounds[0] - self._x, self._threat.bounds[1] - self._x
        for fill in range(1 + FILLS):
            length = delta.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1).clamp_min(1e-12)
            factor = radius / length
            delta = (delta * (factor if fill < FILLS else factor.clamp_max(1))).clamp(low, high)
        return (self._x + delta).clamp(*self._threat.bounds)


class L1Moves(BumpMoves):
    """Lengths are sums of absolute values: what is over is taken from all entries alike, and small ones go to 0."""

    order = 1

    @property
    def gain(self) -> int:
        """A window receives so much for each channel, and the rest of the image pays for it."""
        return self._x.shape[1]

    def _at_radius(self, delta: Tensor) -> Tensor:
        """Return the nearest points in the ball and the image bounds, of changes that are at least eps long."""
        held = self._mass(delta).flatten(1).sum(dim=1).reshape(-1, 1, 1, 1).clamp_min(1e-12)
        return self._threat.project(self._x + delta * (self._radius / held).clamp_min(1), self._x)


MOVES: dict[str, type[Moves]] = {"linf": LinfMoves, "l2": L2Moves, "l1": L1Moves}


def _corners(images: Tensor, side: int | Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Return the flat positions, int64, of the upper left corners of windows at uniform places (all that fit)."""
    height, width = images.shape[2:]
    # A number just below 1, times the count of places, may round up to it.
    top, left = ((u * (size - side + 1)).long() for u, size in ((down, height), (across, width)))
    top, left = (torch.minimum(at, torch.as_tensor(s - side)) for at, s in ((top, height), (left, width)))
    return torch.add(left, top, alpha=width)


def _window(images: Tensor, side: int, corners: Tensor) -> Tensor:
    """Return the flat pixel positions, int64 (n, C, side * side), of windows with their upper left corners there."""
    window = corners[:, None, None] + _square(side, images.shape[3], images.device)
    return window.expand(-1, images.shape[1], -1)


@lru_cache(maxsize=64)
def _square(side: int, width: int, device: torch.device) -> Tensor:
    """Return the flat positions of a square window at the upper left corner of an image, (side * side,)."""
    steps = torch.arange(side, device=device)
    return (steps[:, None] * width + steps).flatten()


def _some_channels(draw: Tensor, channels: int) -> Tensor:
    """Return bool (..., C, 1) for draws (...): a uniform choice among the sets of channels that are not empty."""
    count = min(channels, CODED_CHANNELS)
    code = (1 + (draw * (2**count - 1)).long()).clamp_max(2**count - 1)
    bits = torch.arange(channels, device=draw.device)
    chosen: Tensor = ((code[..., None] >> bits.clamp_max(count)) & 1) == 1
    return chosen.unsqueeze(-1)


def _signs(draws: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(draws < 0.5, -1, 1).to(dtype)


def _turned(shape: Tensor, draws: Tensor) -> Tensor:
    """Return `shape` (s, s), transposed where the draw (...) says so: (..., s, s)."""
    return torch.where(draws[..., None, None] < 0.5, shape, shape.T)


@lru_cache(maxsize=64)
def bump_pair(side: int, dtype: torch.dtype, device: torch.device, order: int = 2) -> Tensor:
    """Return two bumps of opposite sign, one above the other, (side, side), of norm 1; `order` 2 for l2, 1 for l1."""
    pair = torch.cat([_bump(side // 2, side, order), -_bump(side - side // 2, side, order)])
    return (pair / (2 if side > 1 else 1) ** (1 / order)).to(dtype=dtype, device=device)


def _bump(height: int, width: int, order: int) -> Tensor:
    """Return a bump (height, width) of norm 1: sum of 1 / (k + 1)^p over the squares k = 0, 1, ... around its centre.

    Square k holds the entries at most k rows and columns from the centre; the last one holds the rectangle. p is 2 in
    l2, and in l1 4, as in the authors' code (2103.01208).
    """
    rows, columns = (torch.arange(size, dtype=torch.float64) - size // 2 for size in (height, width))
    ring = torch.maximum(rows.abs()[:, None], columns.abs()).long()
    weights = 1 / torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float64).pow(4 // order)
    bump = weights.flip(0).cumsum(0).flip(0)[ring]
    return bump / bump.pow(order).sum().pow(1 / order) if height else bump
