from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.attacks import PGD
from robustbench_lite.attacks.rejection_aware import RejectionAware
from robustbench_lite.core.errors import NotApplicableError
from robustbench_lite.core.goals import Targeted
from robustbench_lite.core.models import ABSTAIN, INVALID, labels_of, predict
from robustbench_lite.core.threats import Lp
from tests.defenses.contract_cases import blobs, fitted

ATTACK = RejectionAware(steps=50, targets=2)


class Toy(nn.Module):
    """Three classes on two pixels: the nearest of three places; suspicion is a wave that cuts each class to islands."""

    rejects = True
    cost: int

    def __init__(self, cost: int = 1) -> None:
        super().__init__()
        self.cost = cost
        self.threshold = torch.tensor(0.0, dtype=torch.float64)
        self.places = torch.tensor([[0.2, 0.2], [0.8, 0.3], [0.4, 0.85]], dtype=torch.float64)

    def answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.flatten(1)
        logits = -(flat.unsqueeze(1) - self.places).square().sum(dim=2)
        return logits, (9 * flat[:, 0]).sin() + (7 * flat[:, 1]).cos() + 0.9

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(x)[0]

    def predict(self, x: Tensor) -> Tensor:
        logits, score = self.answer(x)
        return torch.where(score > self.threshold, ABSTAIN, labels_of(logits))


def images(count: int = 40) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x, Toy()(x).argmax(dim=1)


def brute_force(model: nn.Module, x: Tensor, y: Tensor, threat: Lp, side: int = 101) -> Tensor:
    """The share of a grid over the ball's box, inside the ball, that is wrong and accepted, for each image."""
    axis = torch.linspace(-1, 1, side, dtype=torch.float64)
    shifts = torch.cartesian_prod(axis, axis).reshape(-1, 1, 1, 2) * float(threat.eps)  # type: ignore[arg-type]
    shares = []
    for image, label in zip(x, y, strict=True):
        points = (image + shifts).clamp(0, 1)
        inside = threat.contains(points, image.expand_as(points))
        labels = predict(model, points[inside])
        shares.append(((labels != label) & (labels != ABSTAIN)).double().mean())
    return torch.stack(shares)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.15), ("linf", 0.35), ("l2", 0.3), ("l1", 0.4)])
def test_it_finds_what_a_brute_force_finds(norm: str, eps: float) -> None:
    (x, y), model, threat = images(), Toy(), Lp(norm, eps)
    found = replace(ATTACK, restarts=4)(model, x, y, threat)
    share = brute_force(model, x, y, threat)
    assert not found.success[share == 0].any()
    assert found.success[share > 0.01].all()
    assert 5 < (share > 0.01).sum() < 40
    assert threat.contains(found.x_adv, x).all()
    labels = predict(model, found.x_adv)
    assert torch.equal(found.success, (labels != y) & (labels != ABSTAIN))


def test_plain_gradient_descent_finds_less() -> None:
    (x, y), model, threat = images(), Toy(), Lp("linf", 0.35)
    plain = PGD(steps=60, restarts=3, loss="margin")(model, x, y, threat)
    joint = ATTACK(model, x, y, threat)
    assert joint.success.sum() >= plain.success.sum() + 5


def test_it_beats_plain_gradient_descent_on_a_trained_detector() -> None:
    defense, data = fitted("Dustbin"), blobs(60, "test", 2)
    threat = Lp("linf", 0.5)
    plain = PGD(steps=40, restarts=3)(defense, data.images, data.labels, threat)
    joint = RejectionAware(steps=40, targets=2)(defense, data.images, data.labels, threat)
    assert joint.success.double().mean() > plain.success.double().mean() + 0.1


def test_a_batch_is_its_samples() -> None:
    (x, y), model, threat = images(12), Toy(), Lp("l2", 0.3)
    whole = ATTACK(model, x, y, threat)
    for number in range(12):
        one = slice(number, number + 1)
        alone = ATTACK(model, x[one], y[one], threat, indices=torch.tensor([number]))
        assert torch.equal(alone.x_adv, whole.x_adv[one])
        assert alone.forwards == whole.forwards[one]


@pytest.mark.parametrize("budget", [1, 2, 3, 9, 60])
def test_budgets_are_kept(budget: int) -> None:
    (x, y), model = images(20), Toy(cost=3)
    found = ATTACK(model, x, y, Lp("linf", 0.3), max_queries=budget)
    assert (found.forwards <= budget).all()


def test_a_target_is_reached_and_accepted() -> None:
    (x, _), model = images(30), Toy()
    target = torch.full((30,), 2)
    found = replace(ATTACK, restarts=6)(model, x, Targeted(target), Lp("linf", 1.0))
    assert found.success.double().mean() > 0.9
    assert torch.equal(predict(model, found.x_adv) == 2, found.success)


def test_scores_that_are_no_numbers_do_not_stop_it() -> None:
    class Odd(Toy):
        def answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits, score = super().answer(x)
            return logits, torch.where(x[:, 0, 0, 0] > 0.5, torch.nan, score)

        def predict(self, x: Tensor) -> Tensor:
            labels, score = super().predict(x), self.answer(x)[1]
            return torch.where(score.isfinite(), labels, INVALID)

    x, y = images(10)
    found = ATTACK(Odd(), x, y, Lp("linf", 0.2))
    assert found.x_adv.isfinite().all()


def test_what_it_supports_and_needs() -> None:
    assert [ATTACK.supports(Lp(norm, 0.5)) for norm in ("linf", "l2", "l1", "l0")] == [True, True, True, False]
    assert not ATTACK.supports(Lp("l2", None))
    x, y = images(3)
    with pytest.raises(NotApplicableError, match="Rejecting"):
        ATTACK(nn.Sequential(nn.Flatten(), nn.Linear(2, 3).double()), x, y, Lp("linf", 0.1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"steps": 0}, "steps"), ({"restarts": 1.5}, "restarts"), ({"targets": -1}, "targets"), ({"step_size": 2}, "eps")],
)
def test_faults_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RejectionAware(**settings)  # type: ignore[arg-type]


def test_a_step_in_l1_goes_along_a_twentieth_of_the_pixels() -> None:
    asked: list[Tensor] = []

    class Plain(nn.Module):
        """Two classes, told by a plane through 100 pixels, that accepts all."""

        rejects = True
        threshold = torch.tensor(1.0, dtype=torch.float64)

        def answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
            asked.append(x.detach().clone())
            level = (x.flatten(1) * torch.linspace(1, 2, 100, dtype=torch.float64)).sum(dim=1)
            return torch.stack([75.0 - level, level - 65.0], dim=1), level * 0

        def forward(self, x: Tensor) -> Tensor:
            return self.answer(x)[0]

        def predict(self, x: Tensor) -> Tensor:
            return labels_of(self.answer(x)[0])

    x, y = torch.full((1, 1, 10, 10), 0.5, dtype=torch.float64), torch.tensor([1])
    RejectionAware(steps=3, restarts=1, targets=1)(Plain(), x, y, Lp("l1", 0.5))
    moved = [(point - x).flatten() for point in asked if len(point) == 1 and not torch.equal(point, x)]
    assert moved[0].nonzero().flatten().tolist() == [95, 96, 97, 98, 99]
