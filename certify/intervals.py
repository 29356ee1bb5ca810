"""Intervals: what interval bounds carry from node to node.

An affine map W z + b takes the box with centre c and radius r to the box with centre W c + b and radius |W| r: each
coordinate can sit at whichever end its weight prefers. A monotone map takes its ends to its ends.

At the first affine map the input may still be an Lp ball, which is smaller than the box around it: there, the image of
x + d with |d|_p <= eps has radius eps * |row|_q with 1/p + 1/q = 1, by the definition of the dual norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Ball", "Interval"]


@dataclass(frozen=True, eq=False)
class Ball:
    """The set {centre + scale * d : |d|_p <= eps}, an elementwise image of the input's Lp ball.

    Attributes:
        norm: "l2" or "l1".
        eps: (B,).
        centre: (B, ...).
        scale: (1, ...), of the shape of one centre.
    """

    norm: str
    eps: Tensor
    centre: Tensor
    scale: Tensor

    def moved(self, shape: Callable[[Tensor], Tensor]) -> Ball:
        """Return the image under a map that only moves or drops coordinates (or adds fixed ones)."""
        return Ball(self.norm, self.eps, shape(self.centre), shape(self.scale))

    def affine(self, factor: Tensor | None = None, shift: Tensor | None = None) -> Ball:
        """Return the image under z -> factor * z + shift."""
        centre, scale = self.centre, self.scale
        if factor is not None:
            centre, scale = centre * factor, scale * factor
        return Ball(self.norm, self.eps, centre if shift is None else centre + shift, scale)


@dataclass(frozen=True, eq=False)
class Interval:
    """A box lower <= z <= upper, each (B, ...), and the ball it holds where the input's norm is still known."""

    lower: Tensor
    upper: Tensor
    ball: Ball | None = None

    @property
    def centre(self) -> Tensor:
        """The middle of the box."""
        return torch.lerp(self.lower, self.upper, 0.5)

    @property
    def radius(self) -> Tensor:
        """Half the width of the box."""
        return (self.upper - self.lower) * 0.5

    @classmethod
    def around(cls, centre: Tensor, radius: Tensor, ball: Ball | None = None) -> Interval:
        """Return the box with this centre and radius (>= 0)."""
        return cls(centre - radius, centre + radius, ball)

    def images(self, shape: Callable[[Tensor], Tensor]) -> Interval:
        """Return the image under a map that only moves, drops or adds coordinates."""
        ball = self.ball.moved(shape) if self.ball else None
        return Interval(shape(self.lower), shape(self.upper), ball)

    def monotone(self, function: Callable[[Tensor], Tensor]) -> Interval:
        """Return the image under a non-decreasing map."""
        return Interval(function(self.lower), function(self.upper))

    def intersect(self, other: Interval) -> Interval:
        """Return the box common to both, which must overlap in real arithmetic.

        Where rounding alone separates them, the gap between them is returned: never an empty box.
        """
        lower, upper = torch.maximum(self.lower, other.lower), torch.minimum(self.upper, other.upper)
        return Interval(torch.minimum(lower, upper), torch.maximum(lower, upper))
