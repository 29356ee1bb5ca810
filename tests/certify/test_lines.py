"""Lines around activations: above and below every point of the interval, touching, of least area, differentiable."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.lines import Lines
from robustbench_lite.certify.operators.registry import LINES

CASES: dict[str, tuple[str, dict[str, float], Callable[[Tensor], Tensor]]] = {
    "relu": ("relu", {}, torch.relu),
    "tanh": ("tanh", {}, torch.tanh),
    "sigmoid": ("sigmoid", {}, torch.sigmoid),
    "arctan": ("arctan", {}, torch.atan),
    "gelu": ("gelu", {}, F.gelu),
    "gelu_tanh": ("gelu_tanh", {}, lambda t: F.gelu(t, approximate="tanh")),
    "silu": ("silu", {}, F.silu),
}
for _slope in (0.0, 0.1, 1.0, 2.5):
    CASES[f"leaky_relu_{_slope}"] = (
        "leaky_relu",
        {"negative_slope": _slope},
        lambda t, s=_slope: torch.where(t > 0, t, s * t),  # type: ignore[misc]
    )
for _alpha in (0.0, 0.4, 1.0, 1.01, 3.0):
    CASES[f"elu_{_alpha}"] = ("elu", {"alpha": _alpha}, lambda t, a=_alpha: F.elu(t, a))  # type: ignore[misc]
for _pair in ((1.0, 20.0), (2.0, 1.0), (0.7, -3.0)):
    CASES[f"softplus_{_pair}"] = (
        "softplus",
        {"beta": _pair[0], "threshold": _pair[1]},
        lambda t, p=_pair: F.softplus(t, *p),  # type: ignore[misc]
    )
SPECIAL = sorted({s * k for s in (1.0, -1.0) for k in (0.0, 0.5, 2**0.5, 1.4185040087908283, 2.3993572805154675, 20.0)})
SPECIAL.append(-3 / 0.7)  # kinks, inflections, thresholds
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
EVERY = pytest.mark.parametrize("case", sorted(CASES))


def around(case: str, lower: Tensor, upper: Tensor) -> Lines:
    op, attributes, _ = CASES[case]
    node: Any = SimpleNamespace(attributes=attributes)
    return LINES[op](node, Interval(lower, upper))


def boxes(dtype: torch.dtype, count: int = 700) -> tuple[Tensor, Tensor]:
    """Ordinary, saturated, huge, tiny, degenerate intervals, and intervals at and around kinks and inflections."""
    generator = torch.Generator().manual_seed(11)
    a, b = torch.rand(2, 4, count, generator=generator, dtype=torch.float64)
    centre = torch.cat(
        [12 * a[0] - 6, 80 * a[1] - 40, (a[2] - 0.5).sign() * 10 ** (42 * b[2] - 12), (4 * a[3]).round()]
    )
    radius = torch.cat([8 * b[0], 10 ** (40 * b[1] - 13), 10 ** (5 * a[2] - 3), 10 ** (3 * b[3] - 2)])
    radius[::13] = 0
    sizes = (0.0, 1e-12, 1e-6, 1e-2, 1.0, 1e3, 1e30)
    ends = [(s - below, s + above) for s in SPECIAL for below in sizes for above in sizes]
    ends += [(s, t) for s in SPECIAL for t in SPECIAL if s <= t]
    special = torch.tensor(ends, dtype=torch.float64)
    lower = torch.cat([centre - radius, special[:, 0]]).to(dtype)
    return lower, torch.maximum(lower, torch.cat([centre + radius, special[:, 1]]).to(dtype))


def samples(case: str, lower: Tensor, upper: Tensor) -> Tensor:
    """(S, N) points of the intervals: even, crowded at both ends, and crowded at special points."""
    crowd = 10 ** np.linspace(-16, -0.5, 32)
    share = torch.tensor(np.concatenate([np.linspace(0, 1, 81), crowd, 1 - crowd]))[:, None]
    points = lower * (1 - share) + upper * share
    near = [s + d for s in SPECIAL for d in (-1e-3, 0.0, 1e-12, 1e-3)] + list(np.linspace(-8, 8, 81))
    spread = torch.tensor(near, dtype=torch.float64)[:, None].expand(-1, len(lower))
    return torch.clamp(torch.cat([points, spread]), lower, upper)


def threshold_of(case: str) -> float:
    """Where softplus falls; out of the way for the others."""
    attributes = CASES[case][1]
    return attributes.get("threshold", 1e9) / attributes.get("beta", 1.0)


def gaps(case: str, lines: Lines, lower: Tensor, upper: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """How far the lines are below and above f at t, in units of the size of what is added up there."""
    function = CASES[case][2]
    slope_below, shift_below, slope_above, shift_above = (
        line.double() for line in (lines.lower_slope, lines.lower_shift, lines.upper_slope, lines.upper_shift)
    )
    steepest = torch.maximum(slope_below.abs(), slope_above.abs())
    if CASES[case][0] in ("gelu", "gelu_tanh", "silu"):
        steepest = steepest.clamp_min(0.5)  # they are t / 2 plus an even function
    reach = torch.maximum(-lower, upper)
    size = steepest * reach + torch.maximum(function(lower).abs(), function(upper).abs()) + 1e-30  # float32 underflows
    edge = threshold_of(case)
    size = size + abs(edge) * ((lower <= edge) & (upper >= edge)).double()
    value = function(t)
    return (value - slope_below * t - shift_below) / size, (slope_above * t + shift_above - value) / size


@EVERY
@DTYPES
def test_no_point_of_an_interval_leaves_the_lines(case, dtype):
    lower, upper = boxes(dtype)
    lines = around(case, lower, upper)
    lower, upper = lower.double(), upper.double()
    below, above = gaps(case, lines, lower, upper, samples(case, lower, upper))
    slack = 1e-12 if dtype == torch.float64 else 1e-5
    assert below.isfinite().all() and above.isfinite().all()
    assert below.min() >= -slack
    assert above.min() >= -slack


def nearest(case: str, lines: Lines, lower: Tensor, upper: Tensor, side: int, extra: Tensor) -> Tensor:
    """The least gap over an interval: in each eighth of it, the best point of a grid, refined."""
    width = (upper - lower) / 8
    best = gaps(case, lines, lower, upper, torch.clamp(extra, lower, upper))[side].min(0)[0]
    for part in range(8):
        low, high = lower + part * width, torch.minimum(lower + (part + 1) * width, upper)
        for _ in range(6):
            grid = low + (high - low) * torch.linspace(0, 1, 25, dtype=torch.float64)[:, None]
            t = torch.clamp(grid, lower, upper)
            least, at = gaps(case, lines, lower, upper, t)[side].min(0)
            best, found = torch.minimum(best, least), t.gather(0, at[None])[0]
            step = (high - low) / 24
            low, high = torch.maximum(found - step, lower), torch.minimum(found + step, upper)
    return best


@EVERY
@DTYPES
def test_lines_touch_the_function(case, dtype):
    lower, upper = boxes(dtype, 150)
    jump = threshold_of(case)
    near = 1e-5 * min(abs(jump), 100.0)  # there the lines touch a limit, and not a value
    keep = ((lower - jump).abs() > near) & ((upper - jump).abs() > near)
    lines = around(case, lower[keep], upper[keep])
    extra = torch.tensor([0.0, jump - 1e-12, jump, jump + 1e-12], dtype=torch.float64)[:, None]
    for side in (0, 1):
        best = nearest(case, lines, lower[keep].double(), upper[keep].double(), side, extra)
        assert best.max() <= (1e-9 if dtype == torch.float64 else 1e-5)


def hull_at(x: np.ndarray, y: np.ndarray, at: float) -> float:
    """The least concave function above the points, at one place."""
    hull: list[tuple[float, float]] = []
    for point in zip(x, y, strict=True):
        while len(hull) > 1 and (hull[-1][0] - hull[-2][0]) * (point[1] - hull[-2][1]) >= (
            hull[-1][1] - hull[-2][1]
        ) * (point[0] - hull[-2][0]):
            hull.pop()
        hull.append(point)
    return float(np.interp(at, *zip(*hull, strict=True)))


@pytest.mark.parametrize("case", sorted(set(CASES) - {"softplus_(0.7, -3.0)"}))  # a fall too steep to follow
def test_the_area_between_is_the_least_of_all_sound_lines(case):
    rng = np.random.default_rng(5)
    lower = torch.tensor(np.concatenate([rng.uniform(-7, 5, 60), rng.uniform(-3, 3, 60)]))
    upper = lower + torch.tensor(np.concatenate([rng.uniform(0.5, 12, 60), rng.uniform(0.05, 3, 60)]))
    lines, function = around(case, lower, upper), CASES[case][2]
    for i, (low, high) in enumerate(zip(lower.tolist(), upper.tolist(), strict=True)):
        corners = [s for s in (0.0, 0.5, 0.5 + 1e-9) if low < s < high]
        x = np.unique(np.concatenate([np.linspace(low, high, 1201), corners]))
        y, middle = function(torch.tensor(x)).numpy(), (low + high) / 2
        best = hull_at(x, y, middle) + hull_at(x, -y, middle)
        slope, shift = lines.upper_slope[i] - lines.lower_slope[i], lines.upper_shift[i] - lines.lower_shift[i]
        resolution = (high - low) ** 2 / 1200**2  # the hull of samples lies inside the hull of f
        assert float(slope) * middle + float(shift) <= 1.001 * best + resolution + 1e-12


REAL: dict[str, Callable[[Any], Any]] = {
    "tanh": mpmath.tanh,
    "sigmoid": lambda t: 1 / (1 + mpmath.exp(-t)),
    "arctan": mpmath.atan,
    "gelu": lambda t: t * (1 + mpmath.erf(t / mpmath.sqrt(2))) / 2,
    "silu": lambda t: t / (1 + mpmath.exp(-t)),
    "relu": lambda t: max(t, mpmath.mpf(0)),
    "elu_3.0": lambda t: t if t > 0 else 3 * mpmath.expm1(t),
    "softplus_(1.0, 20.0)": lambda t: t if t > 20 else mpmath.log1p(mpmath.exp(t)),
}


@pytest.mark.parametrize("case", sorted(REAL))
def test_lines_hold_without_any_slack_in_real_arithmetic(case):
    generator = torch.Generator().manual_seed(2)
    lower = 10 * torch.rand(120, generator=generator, dtype=torch.float64) - 6
    upper = lower + 10 ** (5 * torch.rand(120, generator=generator, dtype=torch.float64) - 4)
    lines = around(case, lower, upper)
    parts = (lower, upper, lines.lower_slope, lines.lower_shift, lines.upper_slope, lines.upper_shift)
    with mpmath.workdps(40):
        for row in zip(*(part.tolist() for part in parts), strict=True):
            low, high, slope_below, shift_below, slope_above, shift_above = map(mpmath.mpf, row)
            middle = (low + high) / 2
            for t in (low, (3 * low + high) / 4, middle, (low + 3 * high) / 4, high):
                value = REAL[case](t)
                assert slope_below * t + shift_below <= value <= slope_above * t + shift_above


@EVERY
@DTYPES
def test_a_point_has_two_equal_lines_through_its_value(case, dtype):
    t = torch.linspace(-9, 9, 71, dtype=dtype)  # not the threshold 0.5
    lines = around(case, t, t)
    assert lines.exact.all()
    assert "relu" in case or (lines.lower_slope == 0).all()  # a constant, without rounding
    torch.testing.assert_close(lines.lower_slope * t + lines.lower_shift, CASES[case][2](t), rtol=1e-6, atol=0)


@EVERY
@DTYPES
def test_gradients_are_finite_everywhere(case, dtype):
    lower, upper = (end.requires_grad_() for end in boxes(dtype))
    lines = around(case, lower, upper)
    for part in (lines.lower_slope, lines.lower_shift, lines.upper_slope, lines.upper_shift):
        if part.requires_grad:
            for gradient in torch.autograd.grad(part.sum(), (lower, upper), retain_graph=True):
                assert gradient.isfinite().all()


@EVERY
def test_gradients_are_those_of_the_lines(case):
    generator = torch.Generator().manual_seed(4)
    lower = (6 * torch.rand(25, generator=generator, dtype=torch.float64) - 4).requires_grad_()
    upper = (lower.detach() + 0.2 + 4 * torch.rand(25, generator=generator, dtype=torch.float64)).requires_grad_()

    at = (lower + 2 * upper).detach() / 3

    def values(low: Tensor, high: Tensor) -> Tensor:
        lines = around(case, low, high)
        return torch.stack([lines.lower_slope * at + lines.lower_shift, lines.upper_slope * at + lines.upper_shift])

    assert torch.autograd.gradcheck(values, (lower, upper), eps=1e-6, atol=2e-4)


def test_relu_and_its_free_slopes_are_those_of_crown():
    lower = torch.tensor([-2.0, -1.0, -1.0, -3.0, 0.0, 0.5, -1.0, 0.0], dtype=torch.float64)
    upper = torch.tensor([2.0, 3.0, 0.25, -1.0, 2.0, 0.5, 0.0, 0.0], dtype=torch.float64)
    lines = around("relu", lower, upper)
    close = {"rtol": 1e-14, "atol": 0.0}
    expected = torch.tensor([0.5, 0.75, 0.2, 0, 1, 1, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(lines.upper_slope, expected, **close)
    expected = torch.tensor([1, 0.75, 0.2, 0, 0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(lines.upper_shift, expected, **close)
    assert lines.lower_slope.tolist() == [1, 1, 0, 0, 1, 1, 0, 0]
    assert lines.lower_shift.tolist() == [0] * 8
    assert lines.free is not None
    assert lines.free.tolist() == [True] * 3 + [False] * 5
    assert lines.exact.tolist() == [False] * 3 + [True] * 5


@pytest.mark.parametrize("case", sorted(CASES))
def test_every_free_slope_makes_a_line_below(case):
    lower, upper = boxes(torch.float64)
    lines = around(case, lower, upper)
    if lines.free is None:
        return
    t = samples(case, lower, upper)[:, lines.free]
    assert t.numel() > 0
    for share in (0.0, 0.3, 1.0):
        slope = lines.least + share * (lines.most - lines.least)
        assert (slope * t <= CASES[case][2](t) + 1e-12 * t.abs()).all()


@pytest.mark.parametrize("case", ["relu", "leaky_relu_0.1", "leaky_relu_2.5", "elu_0.4", "elu_3.0"])
def test_a_piece_that_is_straight_is_kept_exactly(case):
    lower, upper = (
        torch.tensor([0.0, 0.3, 1e-9], dtype=torch.float64),
        torch.tensor([1.0, 7.1, 1e9], dtype=torch.float64),
    )
    lines = around(case, lower, upper)
    assert lines.exact.all()
    assert (lines.lower_slope == 1).all() and (lines.lower_shift == 0).all()
