"""Each flag at the edge of what raises it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustbench_lite.evaluation import flags


def mask(*ones: int, n: int = 200) -> Tensor:
    found = torch.zeros(n, dtype=torch.bool)
    found[list(ones)] = True
    return found


NAMES = torch.arange(1000, 1200)
COMPARISONS = {
    "single_step_beats_iterative": lambda weak, strong: flags.single_step_beats_iterative(weak, strong),
    "blind_beats_gradients": lambda weak, strong: flags.blind_beats_gradients(weak, strong, NAMES),
    "noise_beats_gradients": lambda weak, strong: flags.noise_beats_gradients(weak, strong, NAMES),
    "frozen_beats_averaged": lambda weak, strong: flags.frozen_beats_averaged(weak, strong, NAMES),
    "not_monotone": lambda weak, strong: flags.not_monotone(weak, strong),
    "out_of_reach": lambda weak, strong: flags.out_of_reach(~weak | strong),
    "steps_help": lambda weak, strong: flags.steps_help(strong, weak),
    "restarts_help": lambda weak, strong: flags.restarts_help(strong, weak),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_counts_what_the_weak_found_alone(name: str) -> None:
    compare = COMPARISONS[name]
    four, five = mask(0, 1, 2, 3), mask(0, 1, 2, 3, 4)
    assert compare(four, mask()) is None  # 2 % of 200: chance
    flag = compare(five, mask())
    assert flag is not None
    assert (flag.id, flag.raised) == (name, True)
    assert "5 of 200 samples" in flag.evidence
    assert flag.remedy == flags.FLAGS[name].remedy
    assert compare(five, five) is None  # both found them
    assert compare(five, mask(4)) is None
    assert compare(mask(), mask(*range(50))) is None


def test_few_samples_need_three() -> None:
    assert flags.steps_help(mask(n=6), mask(0, 1, n=6)) is None
    assert flags.steps_help(mask(n=6), mask(0, 1, 2, n=6)) is not None


def test_blind_attacks_list_the_samples() -> None:
    found = flags.blind_beats_gradients(mask(*range(30)), mask(0, 1), NAMES)
    assert found is not None
    assert "28 of 200" in found.evidence
    assert found.evidence.endswith("1002, " + ", ".join(map(str, range(1003, 1022))) + " ...")


def test_unstable_gradients_by_their_median_cosine() -> None:
    one = torch.zeros(5, 1, 1, 2)
    one[:, 0, 0, 0] = 1.0
    angles = torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0])
    two = torch.stack([angles.cos(), angles.sin()], dim=1).reshape(5, 1, 1, 2)
    assert flags.unstable_gradients(one, two) is None  # cos 1 = 0.54
    angles[1] = 1.1
    two = 7 * torch.stack([angles.cos(), angles.sin()], dim=1).reshape(5, 1, 1, 2)
    flag = flags.unstable_gradients(one, two)
    assert flag is not None
    assert "0.45" in flag.evidence  # the median is that of 1.1 now
    two[3:] = 0.0  # dead gradients are another flag's
    assert flags.unstable_gradients(one, two) is None
    assert flags.unstable_gradients(one, torch.zeros_like(two)) is None


def test_zero_gradients_name_their_loss() -> None:
    slopes = torch.ones(40, 1, 2, 2)
    slopes[:2] = 0.0
    assert flags.zero_gradients(slopes) is None  # 5 %
    slopes[2] = torch.nan
    flag = flags.zero_gradients(slopes, "cross-entropy")
    assert flag is not None
    assert flag.evidence == "the cross-entropy's gradient is zero or not finite for 3 of 40 clean images"


def test_excess_rejections() -> None:
    assert flags.excess_rejections(mask(*range(10)), mask(*range(20)), mask()) is None
    for noisy, rounded in ((mask(*range(21)), mask()), (mask(), mask(*range(21)))):
        flag = flags.excess_rejections(mask(*range(10)), noisy, rounded)
        assert flag is not None
        assert "rejects 5.0% of clean images" in flag.evidence


def test_every_flag_says_when_it_is_raised_and_what_to_do() -> None:
    others = {"CONVERGENCE", "FLAGS", "PROBED", "UNFINISHED", "Flag", "Kind"}
    assert set(flags.FLAGS) == set(flags.__all__) - others
    for name, kind in flags.FLAGS.items():
        assert callable(getattr(flags, name))
        assert kind.raised_if
        assert not kind.raised_if.startswith("Raised")
        assert kind.remedy
