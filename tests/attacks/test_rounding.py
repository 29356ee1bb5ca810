"""What survives rounding to 8 bits, by hand."""

from __future__ import annotations

import pytest
import torch

from robustbench_lite.attacks import FMN, PGD, RandomNoise, survives_rounding
from robustbench_lite.core.goals import Targeted
from robustbench_lite.core.models import predict
from robustbench_lite.core.results import AttackResult
from robustbench_lite.core.spatial import RotationTranslation
from robustbench_lite.core.threats import Lp


def threshold(at):
    """Class 1 where the only pixel is above `at`."""

    def model(x):
        value = x.flatten(1).sum(dim=1)
        return torch.stack([torch.zeros_like(value), value - at], dim=1)

    return model


def result_of(pixels, success=None):
    x_adv = torch.tensor(pixels, dtype=torch.float64).reshape(-1, 1, 1, 1)
    zeros = torch.zeros(len(x_adv), dtype=torch.int64)
    success = torch.ones(len(x_adv), dtype=torch.bool) if success is None else torch.tensor(success)
    return AttackResult(x_adv, success, zeros.double(), zeros, zeros, zeros)


def column(*pixels):
    return torch.tensor(pixels, dtype=torch.float64).reshape(-1, 1, 1, 1)


def survivors(at, pixels, clean, threat, success=None, levels=11):
    labels = torch.zeros(len(pixels), dtype=torch.int64)
    return survives_rounding(threshold(at), result_of(pixels, success), clean, labels, threat, levels).tolist()


def test_with_eleven_levels_by_hand():
    free = Lp("linf", None)
    # 0.44 -> 0.4, 0.46 -> 0.5, 0.51 -> 0.5; only what is above 0.45 falls.
    assert survivors(0.45, [0.46, 0.46, 0.51], column(0, 0, 0), free) == [True, True, True]
    assert survivors(0.42, [0.44, 0.46, 0.44], column(0, 0, 0), free) == [False, True, False]
    assert survivors(0.42, [0.46, 0.46, 0.44], column(0, 0, 0), free, success=[True, False, True]) == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_rounding_goes_to_the_inside_of_the_ball(norm):
    # 0.56 -> 0.6 leaves the ball of 0.27 around 0.3; 0.5 is inside.
    assert survivors(0.45, [0.56], column(0.3), Lp(norm, 0.27)) == [True]
    assert survivors(0.55, [0.56], column(0.3), Lp(norm, 0.27)) == [False]
    # the same downwards, and an edge that is a level: 0.1 + 3 levels
    assert survivors(0.35, [0.4], column(0.1), Lp(norm, 0.3)) == [True]


def test_a_ball_without_a_level_cannot_be_stored():
    assert survivors(0.33, [0.34], column(0.35), Lp("linf", 0.02)) == [False]
    assert survivors(0.33, [0.34], column(0.35), Lp("linf", None)) == [False]  # 0.3 does not fall
    assert survivors(0.25, [0.34], column(0.35), Lp("linf", None)) == [True]


def test_linf_takes_the_nearest_level_even_beyond_the_clean_value():
    # around 0.35, radius 0.06: levels 0.3 and 0.4 both inside; 0.41 -> 0.4
    assert survivors(0.38, [0.41], column(0.35), Lp("linf", 0.06)) == [True]


def test_other_bounds():
    # levels -1, 0, 1
    threat = Lp("linf", None, bounds=(-1.0, 1.0))
    assert survivors(0.9, [0.95], column(0.0), threat, levels=3) == [True]
    assert survivors(0.3, [0.4], column(0.0), threat, levels=3) == [False]


@pytest.mark.parametrize(("attack", "threat"), [(PGD(), Lp("linf", 8 / 255)), (FMN(), Lp("l2", None))])
def test_on_images_of_8_bits_it_equals_rounding_in_plain_words(attack, threat, net):
    x = torch.randint(0, 256, (12, 1, 6, 6), generator=torch.Generator().manual_seed(1)).double() / 255
    y = predict(net.eval(), x)
    result = attack(net, x, y, threat)
    found = survives_rounding(net, result, x, y, threat)
    rounded = (result.x_adv * 255).round() / 255
    with torch.no_grad():
        assert torch.equal(found, result.success & (predict(net, rounded) != y))  # eps is a whole number of levels
    assert torch.equal(survives_rounding(net, result, x, y, threat, levels=2**40), result.success)


def test_one_forward_pass_a_success_and_none_for_failures(net, images):
    y = predict(net.eval(), images)
    result = PGD(steps=10)(net, images, y, Lp("linf", 0.1))
    seen = []
    net.register_forward_hook(lambda _, args, logits: seen.append(len(logits)))
    survives_rounding(net, result, images, y, Lp("linf", 0.1))
    assert sum(seen) == result.success.sum()
    seen.clear()
    nothing = PGD(steps=2)(net, images, y, Lp("linf", 0.0))
    seen.clear()
    assert not survives_rounding(net, nothing, images, y, Lp("linf", 0.0)).any()
    assert not seen


def test_parametric_threats_round_the_image_alone(net, images):
    y, threat = predict(net.eval(), images), RotationTranslation()
    result = RandomNoise(draws=30)(net, images, y, threat)
    found = survives_rounding(net, result, images, y, threat)
    with torch.no_grad():
        assert torch.equal(found, result.success & (predict(net, (result.x_adv * 255).round() / 255) != y))


def test_targets_and_one_budget_a_sample(net, images):
    target = (predict(net.eval(), images) + 1) % 4
    threat = Lp("linf", torch.linspace(0.1, 0.9, 12, dtype=torch.float64))
    result = PGD()(net, images, Targeted(target), threat)
    found = survives_rounding(net, result, images, Targeted(target), threat)
    assert found.any()
    assert not (found & ~result.success).any()


def test_bad_calls_say_what_is_wrong(net, images):
    y = predict(net.eval(), images)
    result = PGD(steps=2)(net, images, y, Lp("linf", 0.1))
    with pytest.raises(ValueError, match="at least 2"):
        survives_rounding(net, result, images, y, Lp("linf", 0.1), levels=1)
    with pytest.raises(ValueError, match="images of the attack"):
        survives_rounding(net, result, images[:3], y[:3], Lp("linf", 0.1))


def test_memory_bounds_the_questions_and_changes_nothing():
    """The first pass, of at most 64 images, tells what an image takes; then questions are as small as the budget."""
    asked, clean = [], torch.linspace(0, 0.5, 200, dtype=torch.float64)

    def model(x):
        asked.append(len(x))
        return threshold(0.45)(x)

    result, labels = result_of((clean + 0.2).tolist()), torch.zeros(200, dtype=torch.int64)
    images, threat = clean.reshape(-1, 1, 1, 1), Lp("linf", 0.3)
    whole = survives_rounding(model, result, images, labels, threat)
    assert max(asked) == 136  # the rest of 200, after the first pass
    asked.clear()
    frugal = survives_rounding(model, result, images, labels, threat, memory_budget=2000)
    assert asked[0] == 64 > max(asked[1:])
    assert torch.equal(frugal, whole)
    assert 0 < whole.sum() < 200
