from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustbench_lite.defenses.ramps import check_ramp, ramp

SHARE = st.floats(0, 1)
NAN, INF = float("nan"), float("inf")


@given(SHARE, SHARE, SHARE, SHARE)
def test_a_ramp_rises_from_zero_to_one(a: float, b: float, warmup: float, length: float) -> None:
    low, high = sorted((a, b))
    assert 0 <= ramp(low, warmup, length) <= ramp(high, warmup, length) <= 1


def test_its_corners() -> None:
    assert [ramp(t, 0.2, 0.4) for t in (0, 0.2, 0.4, 0.6, 1)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert [ramp(t, 0.5, 0) for t in (0, 0.49, 0.5)] == [0, 0, 1]
    assert ramp(0, 0, 0) == 1


@pytest.mark.parametrize(
    ("warmup", "length"), [(-0.1, 0), (0, -0.1), (0.6, 0.5), (2000, 10_000), (NAN, 0), (0, NAN), (0, INF)]
)
def test_what_does_not_fit_is_refused(warmup: float, length: float) -> None:
    with pytest.raises(ValueError, match="divide numbers of steps"):
        check_ramp(warmup, length)
