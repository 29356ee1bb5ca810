"""The planted masks: flagged by whoever does not know them, broken by whoever does."""

from __future__ import annotations

import pytest
import torch

from robustbench_lite.attacks import PGD
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.evaluation import evaluate
from robustbench_lite.evaluation.masks import MASKS, Naive
from robustbench_lite.evaluation.selftest import Outcome, selftest
from robustbench_lite.zoo import load_defense

SLOW = ("quantised", "random resize", "stochastic weights")
EXPECTED = {
    "quantised": {"zero_gradients", "blind_beats_gradients"},
    "random resize": {"randomised"},
    "temperature": {"zero_gradients"},
    "stochastic weights": {"randomised"},
    "detached": {"zero_gradients", "blind_beats_gradients"},
    "NaN head": {"non_finite"},
}


@pytest.mark.parametrize("mask", [pytest.param(m, marks=pytest.mark.slow) if m in SLOW else m for m in MASKS])
def test_every_mask_is_flagged_and_falls(mask: str) -> None:
    found = selftest(load_defense("digits/standard"), load_data("digits").sample(30, seed=1), Lp("linf", 0.3), mask)
    assert found.passed
    assert EXPECTED[mask] <= set(found.flags)
    assert found.clean > (0.4 if mask == "random resize" else 0.85)  # 7 of 8 pixels, one draw a batch: 0.57 to 0.8
    if mask in ("quantised", "temperature", "detached"):
        assert found.naive > found.adaptive + 0.5  # what an evaluation that does not adapt would have published


def test_without_a_mask_nothing_stands_and_nothing_is_flagged_but_weak_attacks() -> None:
    net, data = load_defense("digits/standard"), load_data("digits").sample(30, seed=1)
    report = evaluate(Naive(net).eval(), data, Lp("linf", 0.3), [PGD(steps=20)], probed=True)
    assert report.flags == []
    assert report.summary()["worst_case"].item() < 0.05


def test_masks_answer_as_the_net() -> None:
    net, x = load_defense("digits/standard"), load_data("digits").head(40).images
    with torch.no_grad():
        expected = net(x).argmax(dim=1)
        for mask in ("temperature", "detached"):
            assert torch.equal(MASKS[mask](net).eval()(x).argmax(dim=1), expected)
        assert bool((MASKS["quantised"](net).eval()(x).argmax(dim=1) == expected).float().mean() > 0.9)


@pytest.mark.parametrize(
    ("flags", "adaptive", "passed"), [((), 0.0, False), (("x",), 0.05, False), (("x",), 0.0, True)]
)
def test_both_are_needed(flags: tuple[str, ...], adaptive: float, passed: bool) -> None:
    assert Outcome("mask", 1.0, 1.0, flags, adaptive).passed == passed
