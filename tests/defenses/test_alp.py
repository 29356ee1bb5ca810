from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from robustbench_lite.attacks.pgd import PGD
from robustbench_lite.core.threats import Lp
from robustbench_lite.defenses.adversarial_training import AdversarialTraining
from robustbench_lite.defenses.alp import ALP
from robustbench_lite.defenses.base import Step
from tests.defenses.training_cases import (
    EPS,
    LAST,
    batch,
    expect_one_pass,
    expect_resumable,
    linear,
    robust_accuracy,
    streams,
    trained,
)

THREAT = Lp("linf", 0.2)


@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_it_adds_the_squared_distance_of_the_logits(mix: float) -> None:
    """On a linear net the logits of x and x' differ by W (x' - x), and so the pairing and its gradient are known."""
    model, b = linear(), batch()
    objective = ALP(PGD(steps=3), THREAT, mix=mix, weight=4.0)
    x_adv = objective.examples(model, b, 1.0, streams(b))
    change = (x_adv - b.x).flatten(1)
    moved = change @ model[1].weight.T
    base = AdversarialTraining(PGD(steps=3), THREAT, mix=mix).loss(model, b, LAST, None, streams(b))
    added = objective.loss(model, b, LAST, None, streams(b)) - base
    torch.testing.assert_close(added, 4 * (moved**2).sum() / (8 * 3), atol=1e-5, rtol=1e-4)
    (slope,) = torch.autograd.grad(added, model[1].weight)
    torch.testing.assert_close(slope, 4 * 2 / (8 * 3) * moved.T.detach() @ change, atol=1e-5, rtol=1e-3)


def test_the_warm_up_has_neither_examples_nor_pairs() -> None:
    model, b = linear(), batch()
    loss = ALP(PGD(), THREAT, warmup=0.2).loss(model, b, Step(10, 100, 0), None, streams(b))
    torch.testing.assert_close(loss, F.cross_entropy(model(b.x), b.y))


def test_the_ramp_raises_eps() -> None:
    model, b = linear(), batch()
    half = ALP(PGD(steps=3), THREAT, ramp=0.5).loss(model, b, Step(25, 100, 0), None, streams(b))
    smaller = ALP(PGD(steps=3), Lp("linf", 0.1)).loss(model, b, LAST, None, streams(b))
    torch.testing.assert_close(half, smaller)


@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_both_images_pass_through_the_net_together(mix: float) -> None:
    expect_one_pass(ALP(PGD(steps=2), Lp("linf", 0.1), mix=mix))


def test_it_raises_accuracy_under_attack() -> None:
    assert robust_accuracy(trained(ALP(PGD(steps=4), Lp("linf", EPS), ramp=0.3))) > robust_accuracy() + 0.2


def test_a_killed_training_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_resumable(ALP(PGD(steps=2), THREAT, ramp=0.5), tmp_path, monkeypatch)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="weight is the weight"):
        ALP(PGD(), THREAT, weight=-1.0)
    with pytest.raises(ValueError, match="share of the clean loss"):
        ALP(PGD(), THREAT, mix=1.0)
