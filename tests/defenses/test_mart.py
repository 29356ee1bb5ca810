from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.attacks.pgd import PGD
from robustbench_lite.core.threats import Lp
from robustbench_lite.defenses.base import Step
from robustbench_lite.defenses.mart import MART, boosted_cross_entropy
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


@dataclass(frozen=True)
class Shift:
    """Stands for an attack: adds the threat's eps."""

    def supports(self, threat: Lp) -> bool:
        return True

    def __call__(self, model: nn.Module, x: Tensor, goal: Tensor, threat: Lp, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(x_adv=x + threat.eps)


def test_boosted_cross_entropy_is_its_definition() -> None:
    z = 3 * torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(30) % 5
    p = softmax(z.numpy(), axis=1)
    expected = []
    for row, label in zip(p, y.tolist(), strict=True):
        rival = max(row[k] for k in range(5) if k != label)
        expected.append(-torch.tensor(row[label]).log() - torch.tensor(1 - rival).log())
    torch.testing.assert_close(boosted_cross_entropy(z, y), torch.stack(expected))


def test_boosted_cross_entropy_is_finite_where_a_wrong_class_is_certain() -> None:
    z = torch.tensor([[0.0, 300.0, -50.0], [300.0, 0.0, 0.0]], requires_grad=True)
    value = boosted_cross_entropy(z, torch.tensor([0, 0]))
    torch.testing.assert_close(value, torch.tensor([600.0, 0.0]))
    (slope,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(slope[0], torch.tensor([-2.0, 2.0, 0.0]))


def test_the_loss_on_a_linear_net() -> None:
    model, b = linear(), batch()
    with torch.no_grad():
        model[1].weight.mul_(8)  # far enough apart that the two directions of the divergence differ
    loss = MART(Shift(), Lp("linf", 0.2), weight=2.5).loss(model, b, LAST, None, streams(b))
    with torch.no_grad():
        clean, moved = (softmax(model(x).double().numpy(), axis=1) for x in (b.x, b.x + 0.2))
    total = 0.0
    for row in range(8):
        y = int(b.y[row])
        rival = max(moved[row, k] for k in range(3) if k != y)
        total -= float(torch.tensor(moved[row, y] * (1 - rival)).log())
        total += 2.5 * float(entropy(clean[row], moved[row])) * (1 - clean[row, y])
    assert float(loss.detach()) == pytest.approx(total / 8, rel=1e-5)


def test_gradients_reach_the_weights_through_the_doubt_as_well() -> None:
    model, b = linear(), batch()
    loss = MART(Shift(), Lp("linf", 0.2), weight=2.5).loss(model, b, LAST, None, streams(b))
    clean, moved = model(b.x), model(b.x + 0.2)
    divergence = F.kl_div(moved.log_softmax(1), clean.softmax(1), reduction="none").sum(dim=1)
    doubt = 1 - clean.softmax(1)[range(8), b.y]
    expected = (boosted_cross_entropy(moved, b.y) + 2.5 * divergence * doubt).mean()
    weights = tuple(model.parameters())
    for ours, theirs in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_both_images_pass_through_the_net_together() -> None:
    expect_one_pass(MART(PGD(steps=2), Lp("linf", 0.1)))


def test_without_weight_it_is_the_boosted_loss_alone_and_gradients_reach_all() -> None:
    model, b = linear(), batch()
    loss = MART(Shift(), Lp("linf", 0.2), weight=0.0).loss(model, b, LAST, None, streams(b))
    torch.testing.assert_close(loss, boosted_cross_entropy(model(b.x + 0.2), b.y).mean())
    MART(PGD(steps=2), Lp("linf", 0.2)).loss(model, b, LAST, None, streams(b)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_warm_up_is_the_clean_loss_and_eps_rises() -> None:
    model, b = linear(), batch()
    objective = MART(Shift(), Lp("linf", 0.2), weight=0.0, warmup=0.2, ramp=0.4)
    loss = objective.loss(model, b, Step(10, 100, 0), None, streams(b))
    torch.testing.assert_close(loss, F.cross_entropy(model(b.x), b.y))
    loss = objective.loss(model, b, Step(40, 100, 0), None, streams(b))
    torch.testing.assert_close(loss, boosted_cross_entropy(model(b.x + 0.1), b.y).mean())


def test_it_raises_accuracy_under_attack() -> None:
    assert robust_accuracy(trained(MART(PGD(steps=4), Lp("linf", EPS), ramp=0.3))) > robust_accuracy() + 0.2


def test_a_killed_training_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_resumable(MART(PGD(steps=2), Lp("linf", 0.1), ramp=0.5), tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("weight is the weight", lambda: MART(PGD(), Lp("linf", 0.1), weight=-1)),
        ("together <= 1", lambda: MART(PGD(), Lp("linf", 0.1), warmup=0.6, ramp=0.6)),
        ("whose eps is one number", lambda: MART(PGD(), Lp("linf", None))),
    ],
)
def test_bad_arguments_are_refused(message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        make()
