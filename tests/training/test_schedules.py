from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustbench_lite.training.schedules import Constant, Cosine, OneCycle, Steps, schedule_named

PROGRESS = st.floats(0, 1, exclude_max=True)


@given(PROGRESS)
def test_factors_lie_between_zero_and_one(progress: float) -> None:
    for name in ("constant", "cosine", "one_cycle", "steps"):
        assert 0 <= schedule_named(name)(progress) <= 1


@given(st.floats(0, 0.99), PROGRESS)
def test_one_cycle_is_two_straight_lines_through_its_corners(warmup: float, progress: float) -> None:
    rises = progress < warmup
    start, end = ((0, 0), (warmup, 1)) if rises else ((warmup, 1), (1, 0))
    line = start[1] + (end[1] - start[1]) * (progress - start[0]) / (end[0] - start[0])
    assert OneCycle(warmup)(progress) == pytest.approx(line, abs=1e-9)


@given(PROGRESS, PROGRESS)
def test_cosine_falls(a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert Cosine()(low) >= Cosine()(high)


def test_corners() -> None:
    assert [Constant()(t) for t in (0.0, 0.99)] == [1.0, 1.0]
    assert Cosine()(0.0) == 1.0
    assert Cosine()(0.5) == pytest.approx(0.5)
    assert OneCycle(0.0)(0.0) == 1.0
    steps = Steps([0.25, 0.5], 0.1)
    assert [steps(t) for t in (0.0, 0.24, 0.25, 0.49, 0.5, 0.9)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_bad_schedules_say_why() -> None:
    with pytest.raises(ValueError, match="did you mean 'one_cycle'"):
        schedule_named("onecycle")
    with pytest.raises(ValueError, match="rising shares"):
        Steps((0.5, 0.25))
    with pytest.raises(ValueError, match="rising shares"):
        Steps((15_000,))
    with pytest.raises(ValueError, match="share of the training"):
        OneCycle(1.0)


def test_a_function_is_a_schedule() -> None:
    assert schedule_named(lambda progress: 0.5)(0.3) == 0.5
