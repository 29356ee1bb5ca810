"""Rows of coefficients over one node's value: what linear bounds carry backwards through a net.

A row is a linear function v -> sum(a * v) of the value v of one node, for one sample of the batch. Rows start at single
neurons (`OneHot`), become patches where convolutions spread them (`Patch`, as in Xu et al., "Automatic Perturbation
Analysis for Scalable Certified Robustness and Beyond", 2020, arXiv:2002.12920), and end as whole maps (`Dense`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

__all__: list[str] = []


@dataclass(frozen=True, eq=False)
class Rows(ABC):
    """N rows over the value of a node.

    Attributes:
        values: the coefficients, (N, ...).
        owner: the sample of each row, int64 (N,); None: row i belongs to sample i.
        shape: of the node's value, without the batch.
    """

    values: Tensor
    owner: Tensor | None
    shape: tuple[int, ...]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.values)

    @abstractmethod
    def beside(self, t: Tensor) -> Tensor:
        """Return the entries that the coefficients stand beside, of `t`, which broadcasts to (B or 1, *shape)."""

    def beside_each(self, *ts: Tensor) -> tuple[Tensor, ...]:
        """Return `beside` of several tensors (B or 1, *shape)."""
        return tuple(self.beside(t) for t in ts)

    @abstractmethod
    def dense(self) -> Dense:
        """Return the same rows with a coefficient for every coordinate."""

    def dot(self, t: Tensor) -> Tensor:
        """Return sum(a * t) of each row, (N,), for `t` as in `beside`."""
        return (self.values * self.beside(t)).flatten(1).sum(1)

    def owned(self, t: Tensor) -> Tensor:
        """Return the entry (N, ...) of each row's sample in `t`, (B, ...); `t` itself where it holds for all rows."""
        return t if self.owner is None or len(t) == 1 else t.index_select(0, self.owner)

    @property
    def samples(self) -> Tensor:
        """The sample of each row, int64 (N,)."""
        return torch.arange(len(self), device=self.values.device) if self.owner is None else self.owner

    def part(self, start: int, stop: int) -> Self:
        """Return some of the rows."""
        return replace(self, values=self.values[start:stop], owner=self.samples[start:stop])

    def scaled(self, t: Tensor) -> Rows:
        """Return the rows a * t."""
        return replace(self, values=self.values * self.beside(t))

    def plus(self, other: Rows) -> Rows:
        """Return the sum of rows that belong to the same samples, in the same order."""
        return Dense(self.dense().values + other.dense().values, self.owner, self.shape)


@dataclass(frozen=True, eq=False)
class Dense(Rows):
    """Rows with a coefficient for every coordinate: `values` (N, *shape)."""

    def take(self, keep: Tensor) -> Dense:
        """Return some of the rows, int64 positions."""
        return replace(self, values=self.values[keep], owner=self.samples[keep])

    def beside(self, t: Tensor) -> Tensor:
        """Return `t` for each row's sample, in the memory format of the coefficients: a product then reads in order."""
        if not _channels_last(self.values) or t.shape[1:] != self.shape:
            return self.owned(t)
        return self.owned(t.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)

    def dot(self, t: Tensor) -> Tensor:
        """Return sum(a * t) of each row; one product of a matrix with a vector where all rows share a sample."""
        if len(t) > 1 or t.shape[1:] != self.shape:
            return super().dot(t)
        if _channels_last(self.values):
            return self.values.permute(0, 2, 3, 1).flatten(1) @ t.permute(0, 2, 3, 1).flatten()
        return self.values.flatten(1) @ t.flatten()

    def dense(self) -> Dense:
        """Return itself."""
        return self


@dataclass(frozen=True, eq=False)
class OneHot(Rows):
    """Rows with one coefficient each: `values` (N,) at the flat positions `index`, int64 (N,)."""

    index: Tensor

    def beside(self, t: Tensor) -> Tensor:
        """Return the entry at each row's position."""
        flat = t.expand(len(t), *self.shape).flatten(1)
        if len(t) == 1:
            return flat[0, self.index]
        return flat[self.samples, self.index]

    def dot(self, t: Tensor) -> Tensor:
        """Return a * t at each row's position."""
        return self.values * self.beside(t)

    def dense(self) -> Dense:
        """Return rows of zeros but for one entry."""
        values = self.values.new_zeros(len(self), math.prod(self.shape))
        values = values.scatter(1, self.index.unsqueeze(1), self.values.unsqueeze(1))
        return Dense(values.reshape(len(self), *self.shape), self.owner, self.shape)

    def part(self, start: int, stop: int) -> Self:
        """Return some of the rows."""
        return replace(super().part(start, stop), index=self.index[start:stop])

    def plus(self, other: Rows) -> Rows:
        """Return the sum; rows at the same positions stay one-hot."""
        if isinstance(other, OneHot) and other.index is self.index:
            return replace(self, values=self.values + other.values)
        return super().plus(other)

    def patch(self) -> Patch:
        """Return the rows as patches of one pixel, for a value of shape (C, H, W)."""
        channels, height, width = self.shape
        channel, pixel = self.index // (height * width), self.index % (height * width)
        values = self.values.new_zeros(len(self), channels).scatter(1, channel.unsqueeze(1), self.values.unsqueeze(1))
        place = torch.stack([pixel // width, pixel % width], dim=1)
        return Patch(values[:, :, None, None], self.owner, self.shape, place)


@dataclass(frozen=True, eq=False)
class Patch(Rows):
    """Rows that are zero outside a window of the map (C, H, W): `values` (N, C, h, w).

    The window's first pixel is place * stride + offset; it may lie partly outside the map, where coefficients are 0.

    Attributes:
        place: where each row started, int64 (N, 2).
        stride: pixels of this map for one of that where the rows started.
        offset: as above.
    """

    place: Tensor
    stride: tuple[int, int] = (1, 1)
    offset: tuple[int, int] = (0, 0)

    @property
    def window(self) -> tuple[int, int]:
        """Height and width of the windows."""
        return self.values.shape[2], self.values.shape[3]

    def covers(self) -> bool:
        """Say whether the windows have as many pixels as the map: then dense rows are no larger."""
        return self.values.shape[2] * self.values.shape[3] >= self.shape[1] * self.shape[2]

    def positions(self, axis: int) -> tuple[Tensor, Tensor]:
        """Return (position (N, size), whether it lies on the map) of the windows along one axis."""
        start = self.place[:, axis] * self.stride[axis] + self.offset[axis]
        at = start.unsqueeze(1) + torch.arange(self.window[axis], device=start.device)
        return at, (at >= 0) & (at < self.shape[axis + 1])

    def beside(self, t: Tensor) -> Tensor:
        """Return the entries under the windows, 0 outside the map."""
        height, width = self.shape[1:]
        if t.shape[2:] == (1, 1):
            return self.owned(t)
        t = t.expand(-1, -1, height, width)
        (y, y_on), (x, x_on) = self.positions(0), self.positions(1)
        index = y.unsqueeze(2) * width + x.unsqueeze(1)
        if len(t) > 1:
            index = index + (self.samples * (height * width)).reshape(-1, 1, 1)
        on = y_on.unsqueeze(2) & x_on.unsqueeze(1)
        return _gathered(t, index, on)

    def beside_each(self, *ts: Tensor) -> tuple[Tensor, ...]:
        """Return `beside` of several tensors, found at once."""
        channels = [t.shape[1] for t in ts]
        return torch.split(self.beside(torch.cat([t.expand(-1, *self.shape) for t in ts], dim=1)), channels, dim=1)

    def dense(self) -> Dense:
        """Return the windows laid onto the map."""
        height, width = self.shape[1:]
        h, w = self.window
        y = torch.arange(height, device=self.place.device) - (self.place[:, :1] * self.stride[0] + self.offset[0])
        x = torch.arange(width, device=self.place.device) - (self.place[:, 1:] * self.stride[1] + self.offset[1])
        on = ((y >= 0) & (y < h)).unsqueeze(2) & ((x >= 0) & (x < w)).unsqueeze(1)
        row = torch.arange(len(self), device=y.device).reshape(-1, 1, 1)
        index = y.unsqueeze(2) * w + x.unsqueeze(1) + row * (h * w)
        return Dense(_gathered(self.values, index, on), self.owner, self.shape)

    def trimmed(self) -> Rows:
        """Return the rows with zeros outside the map; dense where the windows cover it."""
        if self.covers():
            return self.dense()
        on = self.positions(0)[1].unsqueeze(2) & self.positions(1)[1].unsqueeze(1)
        return replace(self, values=self.values * on.unsqueeze(1))

    def plus(self, other: Rows) -> Rows:
        """Return the sum; windows that move together stay windows."""
        if isinstance(other, OneHot):
            other = other.patch()
        if not isinstance(other, Patch) or not self._moves_with(other):
            return super().plus(other)
        first = [min(a, b) for a, b in zip(self.offset, other.offset, strict=True)]
        ends = [_ends(rows) for rows in (self, other)]
        last = [max(a, b) for a, b in zip(*ends, strict=True)]
        one, two = (F.pad(rows.values, _margins(rows, first, last)) for rows in (self, other))
        return replace(self, values=one + two, offset=(first[0], first[1]))

    def _moves_with(self, other: Patch) -> bool:
        return self.stride == other.stride and torch.equal(self.place, other.place)


def _channels_last(t: Tensor) -> bool:
    return t.ndim == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)


def _gathered(t: Tensor, index: Tensor, on: Tensor) -> Tensor:
    """Return pixels (N, C, h, w) of maps `t` (B, C, H, W): those at flat positions b H W + y W + x, 0 where not `on`.

    Channels are put last, so that each pixel is one contiguous read, and a pixel of zeros stands for all that is off.
    """
    pixels = F.pad(t.permute(0, 2, 3, 1).reshape(-1, t.shape[1]), (0, 0, 0, 1))
    found = pixels.index_select(0, torch.where(on, index, len(pixels) - 1).flatten())
    return found.reshape(*index.shape, -1).permute(0, 3, 1, 2)


def _ends(rows: Patch) -> list[int]:
    return [offset + size for offset, size in zip(rows.offset, rows.window, strict=True)]


def _margins(rows: Patch, first: list[int], last: list[int]) -> Any:
    (top, left), (bottom, right) = rows.offset, _ends(rows)
    return (left - first[1], last[1] - right, top - first[0], last[0] - bottom)
