"""Lines around a smooth activation that is convex up to an inflection and concave after it.

Of all lines above f on [l, u], the one with the least area between touches f's concave envelope at the middle m of the
interval. Where f is convex and then concave, that envelope is the line from (l, f(l)) to the point q where it touches
the concave part, and f itself from there on. Hence: the tangent at q where q lies beyond m, the tangent at m where it
does not, and the chord where q lies beyond u. CROWN (Zhang et al. 2018, arXiv 1811.00866) takes q in both cases.

Sound whatever q is: a tangent at a point of the concave part is above all of it, and the convex part less a line is
largest at an end. So a slope is chosen first, with q as exact as a few steps make it, and the line is then moved up to
the largest of three values of f. The line below is the line above -f(-t), with its shift negated.

The line is moved outwards by 8 units of rounding of |slope| * max(|l|, |u|) + max |f|, for the errors of these steps
and of torch's own functions; where l = u both lines are the constant f(l). Not counted: numbers that underflow, and the
rounding of t in an f(t) as small as exp(-|t|), which is |t| units of f itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_lite.certify.lines import Lines

__all__: list[str] = []

Function = Callable[[Tensor], Tensor]
Line = tuple[Tensor, Tensor]  # slope, shift


@dataclass(frozen=True)
class Curve:
    """A function that is convex up to an inflection and concave from there to `end`.

    Attributes:
        value: the function.
        slope: its derivative, to a few units of rounding of itself.
        inflection: where it turns concave.
        touching: of a base and the value there, about where a line from there touches the concave part; where the
            base is right of the inflection, any point no further than that.
        end: where it turns convex again.
    """

    value: Function
    slope: Function
    inflection: float
    touching: Callable[[Tensor, Tensor], Tensor]
    end: float = float("inf")


@dataclass(frozen=True)
class Ends:
    """An interval and what both lines want to know about it; all (B, ...)."""

    lower: Tensor
    upper: Tensor
    at_lower: Tensor
    at_upper: Tensor
    width: Tensor
    centre: Tensor

    @classmethod
    def of(cls, lower: Tensor, upper: Tensor, value: Function) -> Ends:
        """Return the ends of [lower, upper] and the values there."""
        return cls(lower, upper, value(lower), value(upper), upper - lower, (lower + upper) / 2)

    def turned(self) -> Ends:
        """Return the same for -f(-t)."""
        return Ends(-self.upper, -self.lower, -self.at_upper, -self.at_lower, self.width, -self.centre)


def lines_around(curve: Curve, turned: Curve, ends: Ends) -> Lines:
    """Return the lines around a curve; `turned` is -f(-t)."""
    return between(line_above(turned, ends.turned()), line_above(curve, ends))


def between(turned: Line, above: Line) -> Lines:
    """Return the lines around f from the lines above -f(-t) and above f."""
    return Lines(turned[0], -turned[1], *above)


def line_above(curve: Curve, ends: Ends, curved: Tensor | None = None) -> Line:
    """Return slope and shift of the line above a curve, by the rule at the top of this file; `curved`: of `resting`."""
    lower, upper = ends.lower, ends.upper
    top = upper.clamp_max(curve.end)
    middle = ends.centre + (curve.inflection - ends.centre).clamp_min(0) * where(torch.gt, upper, curve.inflection)
    middle = torch.minimum(middle, top)
    with torch.no_grad():
        touching = curve.touching(lower, ends.at_lower)
    narrow = where(torch.lt, ends.width, narrow_width(lower))
    point = torch.lerp(torch.minimum(torch.maximum(touching, middle), top), middle, narrow)
    slope = curve.slope(point)
    if slope.requires_grad:
        slope = _through_both(curve, ends, touching, point, slope)
    rises = curve.slope(top.detach()) * (top - lower).detach() - (ends.at_upper - ends.at_lower).detach()
    slope = torch.lerp(slope, chord(ends), where(torch.ge, rises, 0.0) * (1 - narrow))
    return resting(slope, ends, [(point, curve.value(point))], curved)


def chord(ends: Ends) -> Tensor:
    """Return the slope of the line through both ends; of a width below rounding, the rise alone."""
    unit = torch.finfo(ends.width.dtype).eps
    return (ends.at_upper - ends.at_lower) / torch.nn.functional.threshold(ends.width, unit, 1.0)


def over_corner(slope: Tensor, ends: Ends, inside: Tensor, at: Tensor, value: Tensor) -> Tensor:
    """Return the slope of the line from the corner (at, value) to the end beyond the centre, if it is over the chord.

    Args:
        slope: of the chord, returned elsewhere.
        ends: of the interval.
        inside: 1 where the corner is in it, else 0.
        at: place of the corner.
        value: height of the corner.
    """
    unit, threshold = torch.finfo(slope.dtype).eps, torch.nn.functional.threshold
    left = (value - ends.at_lower) / threshold(at - ends.lower, unit, 1.0)
    right = (ends.at_upper - value) / threshold(ends.upper - at, unit, 1.0)
    side = torch.lerp(left, right, where(torch.ge, ends.centre - at, 0.0))
    over = where(torch.gt, value - ends.at_lower - slope * (at - ends.lower), 0.0)
    return torch.lerp(slope, side, inside * over)


def resting(
    slope: Tensor, ends: Ends, points: Sequence[tuple[Tensor, Tensor]] = (), curved: Tensor | None = None
) -> Line:
    """Lower a line of this slope until it rests on the values at both ends or at one of some points.

    Args:
        slope: of the line.
        ends: of the interval; where they are one, the line is made horizontal.
        points: of the interval, and the values there.
        curved: 0 where the line is exact, and stays in place, 1 where it moves by the rounding; None: 1 everywhere.

    Returns:
        The slope and the shift.
    """
    some = ends.width.detach().sign()
    slope = slope * some
    shift = torch.maximum(ends.at_lower - slope * ends.lower, ends.at_upper - slope * ends.upper)
    highest = torch.maximum(ends.at_lower.abs(), ends.at_upper.abs())
    for point, value in points:
        shift = torch.maximum(shift, value - slope * point)
        highest = torch.maximum(highest, value.abs())
    size = torch.addcmul(highest, slope.abs(), torch.maximum(-ends.lower, ends.upper))
    unit = 8 * torch.finfo(slope.dtype).eps
    return slope, torch.addcmul(shift, size, some if curved is None else some * curved, value=unit)


def narrow_width(like: Tensor) -> float:
    """Return the width below which the rounding of a chord's slope is more than its distance from a tangent's."""
    return float(torch.finfo(like.dtype).eps ** (1 / 3))


def where(compare: Callable[..., Tensor], one: Tensor, other: float) -> Tensor:
    """Return a comparison as 0 and 1, in one pass (a mask and its conversion take four, torch.where takes ten)."""
    return compare(one.detach(), other, out=torch.empty_like(one))


def _through_both(curve: Curve, ends: Ends, touching: Tensor, point: Tensor, slope: Tensor) -> Tensor:
    """Give a tangent through the lower end the derivative of the chord between both: its touching point is the best."""
    narrow = narrow_width(slope)
    reach = touching - ends.lower
    inside = (touching == point) * (reach.detach() > narrow)
    through = (curve.value(touching) - ends.at_lower) / torch.nn.functional.threshold(reach, narrow, 1.0) * inside
    return slope + (through - through.detach())
