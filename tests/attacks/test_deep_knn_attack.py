"""The attack on neighbours: against a brute force in the plane, and within its means."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.attacks import FGSM, PGD, DeepKNNAttack
from robustbench_lite.core.errors import NotApplicableError
from robustbench_lite.core.goals import Targeted
from robustbench_lite.core.models import predict
from robustbench_lite.core.threats import Lp
from robustbench_lite.data.base import Dataset
from robustbench_lite.defenses import DeepKNN
from tests.defenses.contract_cases import blobs, fitted


class Plane(nn.Module):
    """k-nearest neighbours of points in the unit square, compared as they are, with gradients of nothing."""

    def __init__(self, points: Tensor, labels: Tensor, k: int, num_classes: int = 3) -> None:
        super().__init__()
        self.k, self.references, self.reference_labels, self.num_classes = k, [points], labels, num_classes

    def embed(self, x: Tensor) -> list[Tensor]:
        return [x.flatten(1)]

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.cdist(x.flatten(1), self.references[0]).topk(self.k, dim=1, largest=False).indices
        return nn.functional.one_hot(self.reference_labels[rows], self.num_classes).sum(dim=1).to(x.dtype)


def plane(k: int = 3) -> Plane:
    points = torch.rand(60, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    labels = (points[:, 0] > 0.45).long() + ((points[:, 1] > 0.6) & (points[:, 0] > 0.45)).long()
    return Plane(points, labels, k).eval()


def grid(side: int = 401) -> Tensor:
    steps = torch.linspace(0, 1, side, dtype=torch.float64)
    return torch.cartesian_prod(steps, steps).reshape(-1, 1, 1, 2)


def queries(model: Plane, n: int = 12) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, 1, 1, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return x, model(x).argmax(dim=1)


@pytest.mark.parametrize("k", [1, 3])
def test_it_comes_near_the_nearest_point_of_another_answer(k: int) -> None:
    model = plane(k)
    x, y = queries(model)
    space = grid()
    answers, far = model(space).argmax(dim=1), torch.cdist(x.flatten(1), space.flatten(1))
    exact = far.masked_fill(answers == y.unsqueeze(1), torch.inf).amin(dim=1)
    found = DeepKNNAttack(steps=120, runs=4, guides=8, judge_every=5, refresh=20)(model, x, y, Lp("l2", None))
    assert found.success.all()
    assert (found.distance > exact - 0.004).all()  # the grid's own error is at most 0.0018
    assert (found.distance / exact).median() < 1.3


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_with_a_budget_it_finds_what_a_brute_force_finds(norm: str) -> None:
    model, eps, space = plane(), 0.12, grid()
    x, y = queries(model, 24)
    far = torch.cdist(x.flatten(1), space.flatten(1), p=2 if norm == "l2" else torch.inf)
    exists = ((far < eps) & (model(space).argmax(dim=1) != y.unsqueeze(1))).any(dim=1)
    assert exists.any()
    assert not exists.all()
    found = DeepKNNAttack(steps=100, guides=8, judge_every=5, refresh=20)(model, x, y, Lp(norm, eps))
    assert not (found.success & ~exists).any()  # (up to the grid)
    assert found.success.sum() >= 0.8 * exists.sum()


@cache
def defense() -> DeepKNN:
    found = fitted("DeepKNN")
    assert isinstance(found, DeepKNN)
    return found


SMALL: dict[str, Any] = {"steps": 60, "runs": 3, "guides": 10, "refresh": 20, "judge_every": 5}
THREATS = [Lp("l2", None), Lp("l2", 2.0), Lp("linf", 0.4)]


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: f"{threat.norm} {threat.eps}")
def test_successes_are_wrong_accepted_and_inside(threat: Lp) -> None:
    data = blobs(9, "test", seed=2)
    found = DeepKNNAttack(**SMALL)(defense(), data.images, data.labels, threat)
    answers = predict(defense(), found.x_adv)
    assert found.success.double().mean() > 0.5
    assert torch.equal(found.success, (answers != data.labels) & (answers >= 0))
    assert threat.contains(found.x_adv, data.images).all()
    assert (found.forwards > 1).any()


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: f"{threat.norm} {threat.eps}")
def test_a_batch_of_n_is_n_batches_of_one(threat: Lp) -> None:
    data, attack = blobs(4, "test", seed=2), DeepKNNAttack(**{**SMALL, "runs": 2})
    model = plane()
    x, y = queries(model, 6)
    whole = attack(model, x, y, Lp(threat.norm, None if threat.eps is None else 0.2))
    for row in range(6):
        one = attack(model, x[row : row + 1], y[row : row + 1], Lp(threat.norm, None if threat.eps is None else 0.2))
        assert torch.allclose(one.x_adv[0], whole.x_adv[row], atol=1e-9)
        assert one.forwards[0] == whole.forwards[row]
    assert attack(defense(), data.images, data.labels, threat).success.shape == (4,)


@pytest.mark.parametrize("budget", [1, 2, 4, 7, 50])
@pytest.mark.parametrize("threat", THREATS[:2], ids=lambda threat: f"{threat.norm} {threat.eps}")
def test_budgets_are_kept_and_what_is_asked_is_counted(threat: Lp, budget: int) -> None:
    data, model, calls = blobs(6, "test", seed=2), defense(), [0]
    handle = model.net.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    try:
        found = DeepKNNAttack(**SMALL)(model, data.images, data.labels, threat, max_queries=budget)
        assert (found.forwards <= budget).all()
        calls[0] = 0
        one = DeepKNNAttack(**SMALL)(model, data.images[:1], data.labels[:1], threat, max_queries=budget)
        assert calls[0] == one.forwards[0]
    finally:
        handle.remove()


def test_memory_in_chunks_changes_nothing() -> None:
    model = plane()
    x, y = queries(model, 8)
    attack = DeepKNNAttack(**SMALL)
    whole, parts = (attack(model, x, y, Lp("l2", None), memory_budget=room) for room in (None, 2000))
    assert torch.allclose(whole.x_adv, parts.x_adv, atol=1e-9)


def test_it_is_stronger_than_attacks_that_do_not_know_the_neighbours() -> None:
    data, threat = blobs(60, "test", seed=2), Lp("l2", 1.2)
    own = DeepKNNAttack(**SMALL)(defense(), data.images, data.labels, threat)
    plain = FGSM()(defense(), data.images, data.labels, threat, view=defense().net)
    assert own.success.sum() > plain.success.sum()


def test_a_target_is_reached() -> None:
    model = plane()
    x, y = queries(model)
    target = (y + 1) % 3
    found = DeepKNNAttack(steps=120, runs=4, guides=8, judge_every=5, refresh=20)(
        model, x, Targeted(target), Lp("l2", None)
    )
    assert found.success.all()
    assert torch.equal(model(found.x_adv).argmax(dim=1), target)


def test_a_class_with_few_samples_or_none_is_no_obstacle() -> None:
    model = plane(1)
    keep = (model.reference_labels != 2).nonzero().flatten()
    keep = torch.cat([keep, (model.reference_labels == 2).nonzero().flatten()[:1]])
    few = Plane(model.references[0][keep], model.reference_labels[keep] * 2, 1, 6)  # classes 0, 2 and, once, 4
    x, _ = queries(model, 6)
    attack, y = DeepKNNAttack(**SMALL), few(x).argmax(dim=1)
    found = attack(few, x, y, Lp("l2", None))
    assert found.x_adv.isfinite().all()
    assert found.success.double().mean() > 0.5
    plain = Plane(few.references[0], few.reference_labels // 2, 1)  # the same without empty classes
    for threat in (Lp("l2", None), Lp("linf", 0.2)):
        one, other = attack(few, x, y, threat), attack(plain, x, y // 2, threat)
        assert torch.equal(one.x_adv, other.x_adv)
    assert attack(few, x, Targeted(torch.full((6,), 4)), Lp("l2", None)).success.any()
    with pytest.raises(ValueError, match=r"no training sample of class 3, 5.*among the classes \[0, 2, 4\]"):
        attack(few, x, Targeted(torch.tensor([0, 2, 3, 4, 5, 5])), Lp("l2", None))


def test_a_trained_defense_without_samples_of_its_last_class_is_attacked_and_refuses_it_as_a_target() -> None:
    data, calibration = blobs(60), blobs(90, "calibration", 1)
    keep = data.labels != 2
    part = Dataset("blobs", "train", data.images[keep], data.labels[keep], data.indices[keep], 3)
    model = DeepKNN(defense().net, 10, calibration=60).eval()
    model.fit(part, calibration)
    x, y = calibration.images[:6], calibration.labels[:6]  # two of them of that class, which are wrong from the start
    assert DeepKNNAttack(**SMALL)(model, x, y, Lp("linf", 0.4), stop="never").success.any()
    with pytest.raises(ValueError, match="no training sample of class 2"):
        DeepKNNAttack(**SMALL)(model, x, Targeted(torch.full((6,), 2)), Lp("l2", None))


def test_models_threats_and_settings_that_do_not_fit_are_named() -> None:
    data = blobs(3, "test", seed=2)
    with pytest.raises(NotApplicableError, match="Neighbours"):
        DeepKNNAttack()(defense().net, data.images, data.labels, Lp("l2", 1.0))
    attack = DeepKNNAttack()
    assert not attack.supports(Lp("linf", None))
    assert not attack.supports(Lp("l1", 5.0))
    assert [type(found) for found in defense().adaptive_attacks(Lp("linf", 0.1))] == [DeepKNNAttack]
    assert defense().adaptive_attacks(Lp("l1", 1.0)) == []
    for name, value in {"steps": 0, "runs": 0, "guides": 1, "refresh": 0, "judge_every": 1.5}.items():
        with pytest.raises(ValueError, match=name):
            DeepKNNAttack(**{name: value})  # type: ignore[arg-type]
    for name in ("learning_rate", "initial_const"):
        with pytest.raises(ValueError, match=name):
            DeepKNNAttack(**{name: 0.0})


def test_the_view_of_the_defense_serves_plain_attacks() -> None:
    data = blobs(30, "test", seed=2)
    found = PGD(steps=20, loss="margin")(
        defense(), data.images, data.labels, Lp("l2", 2.0), view=defense().attack_view()
    )
    assert found.success.double().mean() > 0.5
