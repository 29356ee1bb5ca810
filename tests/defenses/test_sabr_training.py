from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robustbench_lite.attacks import FGSM, PGD, RotationTranslationPGD
from robustbench_lite.certify import CROWN
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.defenses.base import Batch
from robustbench_lite.defenses.ibp_training import IBPTraining
from robustbench_lite.defenses.sabr_training import SABRTraining
from tests.defenses.certified_cases import (
    CLASSES,
    batch,
    convolutional,
    killed_and_resumed,
    linear,
    loss_at,
    standard_on_digits,
    streams,
    tiny,
    trained_on_digits,
    worst_linear_loss,
)


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("subselection", [0.1, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-0.5, 2.0)])
def test_the_box_lies_in_the_ball_and_in_the_range(
    share: float, subselection: float, bounds: tuple[float, float]
) -> None:
    b = batch(40)
    b = Batch(b.x.mul(2.5).sub(0.5).clamp(*bounds), b.y, b.indices)  # many pixels at the ends of the range
    objective = SABRTraining(0.3, subselection=subselection, bounds=bounds)
    low, high = objective.ball(b.x, share)
    lower, upper = objective.box(convolutional(), b, share, streams(40))
    assert bool((low <= lower).all() and (lower <= upper).all() and (upper <= high).all())
    assert bool((lower >= bounds[0]).all() and (upper <= bounds[1]).all())
    width = upper - lower
    assert float(width.max()) <= 2 * subselection * share * 0.3 + 1e-6
    inner = (lower > bounds[0]) & (upper < bounds[1])
    torch.testing.assert_close(width[inner], torch.full_like(width[inner], 2 * subselection * share * 0.3))


def test_the_box_stands_where_the_attack_finds_the_loss_high() -> None:
    model, b = convolutional(), batch(40)
    objective = SABRTraining(0.3, subselection=0.2)
    lower, upper = objective.box(model, b, 1.0, streams(40))

    def loss(x: torch.Tensor) -> float:
        return float(nn.functional.cross_entropy(model(x), b.y).detach())

    assert loss((lower + upper) / 2) > loss(b.x) + 0.05


@pytest.mark.parametrize("kappa", [0.0, 0.5])
@pytest.mark.parametrize("progress", [0.1, 0.99])
def test_lambda_1_is_ibp_training_to_the_bit(kappa: float, progress: float) -> None:
    model, b = convolutional(), batch()
    mine, theirs = SABRTraining(0.2, kappa=kappa, subselection=1.0), IBPTraining(0.2, kappa=kappa)
    assert torch.equal(loss_at(mine, model, b, progress), loss_at(theirs, model, b, progress))


def test_smaller_boxes_make_smaller_losses() -> None:
    model, b = tiny(), batch(40)
    losses = [float(loss_at(SABRTraining(0.3, subselection=s), model, b).detach()) for s in (0.05, 0.3, 0.6, 1.0)]
    assert losses == sorted(losses)
    assert losses[0] < losses[-1] - 0.05


@pytest.mark.parametrize("subselection", [0.1, 0.5, 1.0])
def test_of_two_classes_a_linear_net_has_the_closed_form(subselection: float) -> None:
    """The attack ends in the worst corner of its ball, and the box reaches on to that of the whole ball."""
    model, b = linear(2), batch(classes=2)
    loss = loss_at(SABRTraining(0.2, subselection=subselection), model, b)
    assert float(loss.detach()) == pytest.approx(worst_linear_loss(model, b, 0.2), rel=1e-5)


def test_of_many_classes_a_linear_net_stays_below_it() -> None:
    model, b = linear(CLASSES), batch()
    loss = loss_at(SABRTraining(0.2, subselection=0.1), model, b)
    assert float(loss.detach()) < worst_linear_loss(model, b, 0.2) - 0.01


def test_it_certifies_what_standard_training_does_not() -> None:
    held_out, threat = load_data("digits", "test"), Lp("linf", 0.1)
    model = trained_on_digits(SABRTraining(0.1, subselection=0.5, attack=PGD(steps=2), warmup=0.1, ramp=0.4))

    def proven(net: nn.Module) -> float:
        return float(CROWN()(net, held_out.images, held_out.labels, threat).certified.float().mean())

    assert proven(model) > proven(standard_on_digits()) + 0.2


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = SABRTraining(0.1, attack=PGD(steps=2), warmup=0.1, ramp=0.4)
    assert killed_and_resumed(objective, tmp_path / "run.pt", monkeypatch)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("for 0 use AdversarialTraining", lambda: SABRTraining(0.1, subselection=0.0)),
        (r"in \(0, 1\]", lambda: SABRTraining(0.1, subselection=1.1)),
        (r"in \(0, 1\]", lambda: SABRTraining(0.1, subselection=float("nan"))),
        ("does not support", lambda: SABRTraining(0.1, attack=RotationTranslationPGD())),
        ("eps must be > 0", lambda: SABRTraining(0, attack=FGSM())),
    ],
)
def test_bad_arguments_are_refused(message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        make()
