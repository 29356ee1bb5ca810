"""The even parts of GELU and SiLU: h(t) = f(t) - t / 2, convex between -c and c, concave outside.

Where a line from (b, h(b)) touches h at q, h'(q) = (h(q) - h(b)) / (q - b). Newton's step for q with the right side
fixed converges quadratically, as the derivative of the right side vanishes at the solution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__: list[str] = []

STEPS = 2
APART = 1e-3  # bases nearer to the inflection count as this far from it: the steps divide by the curvature there
Jet = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Even:
    """The even part of an activation.

    Attributes:
        jet: h and its first two derivatives, h' to a few units of rounding of itself.
        inflection: c.
        limit: where a line of slope 1/2, the limit of h', touches the convex part: -1 times where f has its minimum.
        tail: first guess of where a line from a base b in (0, c) touches the concave part, from log(c / b): right to
            first order at c, and 0.1 off for bases down to 0.01.
    """

    jet: Jet
    inflection: float
    limit: float
    tail: Callable[[Tensor], Tensor]

    def value(self, t: Tensor) -> Tensor:
        """Return h."""
        return self.jet(t)[0]

    def slope(self, t: Tensor) -> Tensor:
        """Return h'."""
        return self.jet(t)[1]

    def touching_tail(self, base: Tensor, value: Tensor) -> Tensor:
        """Return about where a line from a base left of c touches the concave part: nowhere, if the base is below 0."""
        inside = base.clamp(1e-6, self.inflection - APART)
        return self._steps(inside, self.tail((self.inflection / inside).log())).clamp_min(self.inflection)

    def touching_bowl(self, base: Tensor, value: Tensor) -> Tensor:
        """Return minus about where a line from -base > c touches the convex part."""
        outside = (-base).clamp_min(self.inflection + APART)
        near = self.inflection / outside
        near = near * (0.42 + (1.74 - 1.16 * near) * near.square())  # 1 at c, 0 in the limit, 0.05 off between
        start = self.limit + (self.inflection - self.limit) * near
        return -self._steps(outside, start).clamp(self.limit, self.inflection)

    def _steps(self, base: Tensor, start: Tensor) -> Tensor:
        from_value, point = self.value(base), start
        for _ in range(STEPS):
            value, slope, curvature = self.jet(point)
            step = ((value - from_value) / (point - base) - slope) / curvature
            point = point + step.clamp(-0.5, 0.5)  # rounding alone can make it huge where there is no curvature left
        return point


def _gelu(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    half, density = torch.erf(t * math.sqrt(0.5)) / 2, torch.exp(t.square() / -2) / math.sqrt(2 * math.pi)
    return t * half, half + t * density, (2 - t.square()) * density


def _silu(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    half, small = torch.tanh(t / 2) / 2, torch.exp(-t.abs())
    quarter = small / (1 + small).square()  # of 1 / cosh(t / 2)^2
    return t * half, half + t * quarter, 2 * quarter * (1 - t * half)


def _gelu_tanh(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    near = t.clamp(-30, 30)  # tanh is 1 long before
    square, factor = near.square(), math.sqrt(2 / math.pi)
    inner, rate = factor * near * (1 + 0.044715 * square), factor * (1 + 3 * 0.044715 * square)
    half, small = torch.tanh(inner) / 2, torch.exp(-2 * inner.abs())
    bell = 2 * small / (1 + small).square() * rate
    return t * half, half + near * bell, bell * (2 + near * (6 * 0.044715 * factor * near / rate - 4 * half * rate))


def _gelu_tail(x: Tensor) -> Tensor:
    return (2 + 2 * x + 0.5 * x * (x / (x + 0.4))).sqrt()


def _silu_tail(x: Tensor) -> Tensor:
    return 2.4 + x * (1.2 + 0.25 * (x / (x + 0.4)))


EVEN = {
    "gelu": Even(_gelu, math.sqrt(2), 0.7517915246935645, _gelu_tail),
    "gelu_tanh": Even(_gelu_tanh, 1.4185040087908283, 0.7524614220710163, _gelu_tail),
    "silu": Even(_silu, 2.3993572805154675, 1.2784645427610737, _silu_tail),
}
