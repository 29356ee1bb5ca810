"""Security curves: equal to separate runs, monotone, re-judged, and paid for by those who stand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from robustbench_lite.attacks import FGSM, FMN, PGD, ADef, RandomNoise, RotationTranslationGrid, security_curve
from robustbench_lite.core.goals import Targeted
from robustbench_lite.core.models import predict
from robustbench_lite.core.spatial import Deformation, ParametricThreat, RotationTranslation
from robustbench_lite.core.threats import Lp

EPS = [0.02, 0.05, 0.1, 0.2, 0.4]


@pytest.fixture
def y(net, images):
    labels = predict(net, images)
    labels[0] = (labels[0] + 1) % 4
    return labels


@pytest.mark.parametrize("attack", [PGD(steps=10, random_start=False), FGSM()])
def test_it_equals_separate_runs_of_a_deterministic_attack(attack, net, images, y):
    curve = security_curve(attack, net, images, y, Lp("linf", None), EPS)
    separate = torch.stack([attack(net, images, y, Lp("linf", eps)).success for eps in EPS])
    assert torch.equal(curve.success[1:], separate.cummax(dim=0).values)
    assert torch.equal(curve.success[0], predict(net.eval(), images) != y)


def test_it_is_monotone_and_its_points_hold(net, images, y):
    curve = security_curve(PGD(steps=10), net, images, y, Lp("l2", 0.5), [0.1, 0.2, 0.4, 0.8, 1.6])
    assert (curve.error.diff() >= 0).all()
    assert torch.allclose(curve.robust_accuracy + curve.error, torch.ones(6, dtype=torch.float64))
    broken = curve.smallest.isfinite()
    assert torch.equal(predict(net.eval(), curve.x_adv) != y, broken)
    distance = (curve.x_adv - images).flatten(1).norm(dim=1)
    assert (distance <= curve.smallest + 1e-6).all()
    assert (distance[~broken] == 0).all()
    assert curve.smallest[0] == 0


def test_who_has_fallen_costs_nothing_and_the_rest_is_counted(net, images, y):
    seen = []
    net.register_forward_hook(lambda _, args, logits: seen.append(len(logits)))
    curve = security_curve(PGD(steps=10), net, images, y, Lp("linf", None), EPS)
    assert curve.forwards.sum() == sum(seen)
    fell = curve.success[:-1]
    assert (curve.forwards[1:][fell] == 0).all()
    assert (curve.forwards[1:][~fell] > 0).all()
    assert (curve.backwards[0] == 0).all()


def test_max_queries_holds_at_each_budget(net, images, y):
    curve = security_curve(PGD(steps=10), net, images, y, Lp("linf", None), EPS, max_queries=4)
    assert curve.forwards.max() <= 4


def test_a_batch_equals_its_samples_and_one_seed_gives_one_answer(net, images, y):
    names, eps = torch.arange(40, 52), [0.05, "1/10", 0.3]

    def curve(part):
        source = torch.Generator().manual_seed(7)
        threat = Lp("linf", None)
        return security_curve(
            RandomNoise(draws=20), net, images[part], y[part], threat, eps, indices=names[part], generator=source
        )

    whole = curve(slice(None))
    assert torch.equal(whole.x_adv, curve(slice(None)).x_adv)
    for i in range(12):
        alone = curve(slice(i, i + 1))
        assert torch.equal(alone.smallest, whole.smallest[i : i + 1])
        assert torch.equal(alone.forwards, whole.forwards[:, i : i + 1])


def test_a_view_gives_gradients_and_the_model_judges(net, images, y):
    blunt = type("Blunt", (torch.nn.Module,), {"forward": lambda self, x: net(x).round(decimals=1)})()
    blind = security_curve(PGD(steps=5, random_start=False), blunt, images, y, Lp("linf", None), EPS)
    sighted = security_curve(PGD(steps=5, random_start=False), blunt, images, y, Lp("linf", None), EPS, view=net)
    assert sighted.error[-1] > blind.error[-1]
    assert torch.equal(predict(blunt, sighted.x_adv) != y, sighted.smallest.isfinite())


def test_numbers_by_hand():
    """One weight: the image x falls at a budget of x exactly, so four pixels give four thresholds."""

    def model(x):
        value = x.flatten(1).sum(dim=1)
        return torch.stack([value, torch.full_like(value, 1e-4)], dim=1)

    x = torch.tensor([0.0, 0.15, 0.25, 0.9], dtype=torch.float64).reshape(4, 1, 1, 1)
    labels = torch.zeros(4, dtype=torch.int64)
    curve = security_curve(PGD(steps=5, random_start=False), model, x, labels, Lp("linf", None), [0.1, 0.2, 0.3])
    assert curve.smallest.tolist() == [0, 0.2, 0.3, torch.inf]
    assert curve.error.tolist() == [0.25, 0.25, 0.5, 0.75]
    assert curve.mean_error == pytest.approx((0.25 + 0.375 + 0.625) * 0.1 / 0.3)
    table = curve.table()
    assert table["broken"].tolist() == [1, 1, 2, 3]
    # Clopper and Pearson for 1 of 4: solutions of P(X >= 1) = 0.025 and P(X <= 1) = 0.025.
    low, high = table.loc[0, ["low", "high"]]
    assert 1 - (1 - low) ** 4 == pytest.approx(0.025, abs=1e-6)
    assert (1 - high) ** 4 + 4 * high * (1 - high) ** 3 == pytest.approx(0.025, abs=1e-6)


def test_targets_and_minimum_norm_attacks(net, images):
    target = (predict(net, images) + 1) % 4
    curve = security_curve(FMN(steps=50), net, images, Targeted(target), Lp("l2", None), [0.5, 2.0, 4.0])
    assert torch.equal(predict(net.eval(), curve.x_adv) == target, curve.smallest.isfinite())
    assert curve.error[-1] > 0.5


def test_the_empty_batch_and_the_empty_list(net, images, y):
    empty = security_curve(PGD(), net, images[:0], y[:0], Lp("linf", None), EPS)
    assert empty.success.shape == (6, 0)
    assert len(empty.table()) == 6
    clean = security_curve(PGD(), net, images, y, Lp("linf", None), [0.0])
    assert clean.mean_error == clean.error.item() == pytest.approx(1 / 12)


@pytest.mark.parametrize(
    ("attack", "threat", "budgets"),
    [
        (RotationTranslationGrid(angles=7, shifts=3), RotationTranslation(20, 1), [0.25, 0.5, 1.0, 1.5]),
        (ADef(), Deformation(1.0), [0.2, 0.5, 1.0]),
    ],
    ids=["rotation and translation", "deformation"],
)
def test_parametric_threats_have_budgets_too(attack, threat, budgets, net, images, y):
    """Multiples of both for rotations and translations, pixels for deformations."""
    curve = security_curve(attack, net, images, y, threat, budgets)
    sized = [threat.resized(budget) for budget in budgets]
    assert [limit.pixels for limit in sized] == budgets
    if isinstance(threat, RotationTranslation):
        assert [limit.degrees for limit in sized] == [20 * budget for budget in budgets]
    separate = torch.stack([attack(net, images, y, limit).success for limit in sized])
    assert torch.equal(curve.success[1:], separate.cummax(dim=0).values)
    assert curve.success[-1].sum() > curve.success[0].sum()
    assert torch.equal(predict(net.eval(), curve.x_adv) != y, curve.smallest.isfinite())


@dataclass(frozen=True)
class Fixed(ParametricThreat):
    """A threat without a budget that could be another."""

    bounds = (0.0, 1.0)
    name, size = "fixed", 1.0
    apply = check_fits = contains = distance = grid = origin = padding = project = random_point = steepest = None


def test_bad_calls_say_what_is_wrong(net, images, y):
    for attack, threat, eps, message in [
        (PGD(), Lp("linf", None), [0.2, 0.1], "strictly ascending"),
        (PGD(), Lp("linf", None), [0.1, 0.1], "strictly ascending"),
        (PGD(), Lp("linf", None), [-0.1], "strictly ascending"),
        (PGD(), Lp("linf", None), ["8/256 px"], "number or a fraction"),
        (PGD(), Lp("linf", None), [8], "8/255"),
        (PGD(), Lp("l0", None), [1, 2], "does not support"),
        (PGD(), Fixed(), [1.0], "has one budget only"),
    ]:
        with pytest.raises(ValueError, match=message):
            security_curve(attack, net, images, y, threat, eps)
