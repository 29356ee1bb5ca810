"""Random streams, one a sample: what a sample draws depends on the seed and its index, never on its neighbours."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Streams"]

_MASK = (1 << 64) - 1


def _mix(a: int, b: int) -> int:
    """Mix two integers into one 64-bit seed (the finaliser of SplitMix64, Steele, Lea and Flood 2014)."""
    z = (a * 0x9E3779B97F4A7C15 + b + 0x632BE59BD9B4E019) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class Streams:
    """One generator a sample, on one device.

    Every draw advances each stream by the same amount, so neither batch size, nor order, nor the removal of finished
    samples changes what a sample meets. Bits are equal on the same kind of device.
    """

    def __init__(self, root: int, indices: list[int], device: torch.device) -> None:
        self.root, self.indices, self.device = root, indices, device
        self._generators = [torch.Generator(device).manual_seed(_mix(root, i)) for i in indices]

    @classmethod
    def from_generator(
        cls, generator: torch.Generator | None, indices: Tensor, device: torch.device | str = "cpu"
    ) -> Streams:
        """Draw one int64 from `generator` (none given: a fresh one with seed 0) and derive a stream for each index."""
        source = torch.Generator().manual_seed(0) if generator is None else generator
        root = torch.randint(0, 2**63 - 1, (), generator=source, device=source.device, dtype=torch.int64)
        return cls(int(root), [int(i) for i in indices.tolist()], torch.device(device))

    def take(self, keep: Tensor) -> Streams:
        """Return the streams of these rows (positions, or a boolean mask); they share their state with this object."""
        rows = keep.nonzero().flatten() if keep.dtype == torch.bool else keep
        part = object.__new__(Streams)
        chosen = rows.tolist()
        part.root, part.device = self.root, self.device
        part.indices = [self.indices[i] for i in chosen]
        part._generators = [self._generators[i] for i in chosen]
        return part

    def fork(self, label: int) -> Streams:
        """Return fresh streams that depend on the root, `label` and the indices alone."""
        return Streams(_mix(self.root, label + 1), self.indices, self.device)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (B, *shape) uniform in [0, 1)."""
        return self._fill(shape, dtype, lambda row, g: row.uniform_(generator=g))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (B, *shape) standard normal."""
        return self._fill(shape, dtype, lambda row, g: row.normal_(generator=g))

    def integers(self, high: int, *shape: int) -> Tensor:
        """Return int64 (B, *shape) uniform in 0 .. high - 1."""
        return self._fill(shape, torch.int64, lambda row, g: row.random_(0, high, generator=g))

    def _fill(
        self, shape: tuple[int, ...], dtype: torch.dtype, draw: Callable[[Tensor, torch.Generator], Tensor]
    ) -> Tensor:
        out = torch.empty((len(self), *shape), dtype=dtype, device=self.device)
        for row, generator in zip(out.unbind(0), self._generators, strict=True):
            draw(row, generator)
        return out

    def __len__(self) -> int:
        return len(self._generators)
