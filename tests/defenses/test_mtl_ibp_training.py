from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robustbench_lite.attacks import PGD, RotationTranslationPGD
from robustbench_lite.certify import CROWN
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.defenses.adversarial_training import AdversarialTraining
from robustbench_lite.defenses.ibp_training import IBPTraining
from robustbench_lite.defenses.mtl_ibp_training import MTLIBPTraining
from tests.defenses.certified_cases import (
    batch,
    convolutional,
    killed_and_resumed,
    linear,
    loss_at,
    standard_on_digits,
    trained_on_digits,
    worst_linear_loss,
)

RAMP: dict[str, Any] = {"warmup": 0.05, "ramp": 0.4}


@pytest.mark.parametrize("progress", [0.0, 0.2, 0.99])
def test_alpha_0_is_adversarial_training_to_the_bit(progress: float) -> None:
    model, b, attack = convolutional(), batch(), PGD(steps=3)
    mine = MTLIBPTraining(0.2, alpha=0.0, attack=attack, **RAMP)
    theirs = AdversarialTraining(attack, Lp("linf", 0.2), **RAMP)
    assert torch.equal(loss_at(mine, model, b, progress), loss_at(theirs, model, b, progress))


@pytest.mark.parametrize("progress", [0.0, 0.99])
def test_alpha_1_is_ibp_training_without_a_clean_loss(progress: float) -> None:
    model, b = convolutional(), batch()
    mine, theirs = MTLIBPTraining(0.2, alpha=1.0, **RAMP), IBPTraining(0.2, kappa=0.0, **RAMP)
    assert torch.equal(loss_at(mine, model, b, progress), loss_at(theirs, model, b, progress))


def test_between_them_it_is_their_convex_combination() -> None:
    model, b = convolutional(), batch()
    low, middle, high = (float(loss_at(MTLIBPTraining(0.2, alpha=a), model, b).detach()) for a in (0.0, 0.3, 1.0))
    assert low < high - 0.01
    assert middle == pytest.approx(0.7 * low + 0.3 * high, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_of_two_classes_a_linear_net_has_the_closed_form(alpha: float, share: float) -> None:
    """There the attack finds the worst case, and the interval bound is it."""
    model, b = linear(2), batch(classes=2)
    loss = loss_at(MTLIBPTraining(0.2, alpha=alpha, warmup=0.0, ramp=0.8), model, b, 0.8 * share)
    assert float(loss.detach()) == pytest.approx(worst_linear_loss(model, b, share * 0.2), rel=1e-5)


def test_batch_norm_sees_one_batch_a_step_whatever_alpha_is() -> None:
    for alpha in (0.0, 0.5, 1.0):
        model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
        loss_at(MTLIBPTraining(0.2, alpha=alpha), model, batch())
        assert model[1].num_batches_tracked == 1
        assert model[1].training


def test_it_certifies_what_standard_training_does_not() -> None:
    held_out, threat = load_data("digits", "test"), Lp("linf", 0.1)
    model = trained_on_digits(MTLIBPTraining(0.1, alpha=0.3, attack=PGD(steps=2), warmup=0.1, ramp=0.4))

    def proven(net: nn.Module) -> float:
        return float(CROWN()(net, held_out.images, held_out.labels, threat).certified.float().mean())

    assert proven(model) > proven(standard_on_digits()) + 0.2


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = MTLIBPTraining(0.1, attack=PGD(steps=2), **RAMP)
    assert killed_and_resumed(objective, tmp_path / "run.pt", monkeypatch)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("alpha is the share", lambda: MTLIBPTraining(0.1, alpha=-0.1)),
        ("alpha is the share", lambda: MTLIBPTraining(0.1, alpha=float("nan"))),
        ("does not support", lambda: MTLIBPTraining(0.1, attack=RotationTranslationPGD())),
        ("eps must be > 0", lambda: MTLIBPTraining(0)),
    ],
)
def test_bad_arguments_are_refused(message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        make()
