"""AutoAttack as the union of its parts, and the quick schedule: targets ranked by distance, effort where it pays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustbench_lite.attacks import APGD, FABT, AutoAttack, FarFMN, QuickAutoAttack, Square, auto_attack
from robustbench_lite.core.goals import Targeted, Untargeted
from robustbench_lite.core.losses import margin
from robustbench_lite.core.models import predict
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.threats import Lp
from tests.conftest import tiny_net

BALLS = [Lp("linf", 0.06), Lp("l2", 0.25), Lp("l1", 0.8)]
every_ball = pytest.mark.parametrize("threat", BALLS, ids=lambda threat: threat.norm)
BUDGET = 700


@every_ball
def test_the_ensemble_is_its_parts_one_after_the_other(threat, net, images):
    """With `stop="success"` a part only adds to what the ones before found, and each pays for who still stands."""
    y = predict(net, images)
    whole = AutoAttack()(net, images, y, threat, max_queries=BUDGET)
    first = AutoAttack().parts(threat)[0](net, images, y, threat, max_queries=BUDGET)
    assert whole.success[first.success].all()
    assert 0 < whole.success.sum() < len(images)
    assert (whole.forwards[~whole.success] > first.forwards[~whole.success]).all()
    assert threat.contains(whole.x_adv, images).all()


class FourWays(nn.Module):
    """Four classes, and four kinds of inputs, told by the first pixel, that one part of the ensemble each can break.

    m is an affine function of the other pixels, positive at the clean image. The kinds: m beside other logits, which
    any gradient breaks; the same, a million times as large, where the cross-entropy is flat; equal logits but m, where
    the ratio of differences is constant too; and m of quantised pixels, where no gradient is left.
    """

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.where(torch.rand(35, generator=g) < 0.5, -1.0, 1.0).double() / 35)

    def forward(self, x):
        kind = (x[:, 0, 0, 0] * 4).long().clamp(0, 3)
        pixels = x.flatten(1)[:, 1:]
        pixels = torch.where((kind == 3).unsqueeze(1), (pixels * 20).floor() / 20, pixels)
        m = ((pixels - 0.5) @ self.weight + 0.06).unsqueeze(1)
        uneven = torch.cat([m, -m, torch.full_like(m, -0.3), torch.full_like(m, -0.5)], dim=1)
        even = torch.cat([m, -m, -m, -m], dim=1)
        logits = torch.where((kind >= 2).unsqueeze(1), even, uneven)
        return torch.where((kind >= 1).unsqueeze(1), 1e6 * logits, logits)


SMALL = (
    APGD(steps=20),
    APGD(loss="dlr_targeted", target_classes=3, steps=20),
    FABT(target_classes=3, steps=20),
    Square(queries=500),
)


def test_each_part_breaks_what_is_left_for_it(monkeypatch):
    x = torch.full((8, 1, 6, 6), 0.5, dtype=torch.float64)
    x[:, 0, 0, 0] = torch.tensor([0.1, 0.35, 0.6, 0.85]).repeat_interleave(2)
    kind, y = torch.arange(4).repeat_interleave(2), torch.zeros(8, dtype=torch.int64)
    for count in range(1, 5):
        monkeypatch.setitem(auto_attack.VARIANTS, "standard", {"linf": SMALL[:count]})
        result = AutoAttack()(FourWays(), x, y, Lp("linf", 0.1))
        assert result.success.tolist() == (kind < count).tolist()
    broken_after = [result.first_success[kind == k].min().item() for k in range(4)]
    assert broken_after == sorted(broken_after)
    assert (result.first_success == result.forwards).all()  # who has fallen pays no more


@pytest.mark.parametrize("stop", ["success", "never"])
def test_a_failure_is_the_point_of_the_largest_margin_among_all_parts(monkeypatch, stop):
    """Cross-entropies, ratios and margins do not compare: the ensemble ranks by one measure."""
    asked, net, x = [], tiny_net(), torch.full((1, 1, 6, 6), 0.5, dtype=torch.float64)
    y, threat = predict(net, x), Lp("linf", 0.003)
    monkeypatch.setitem(auto_attack.VARIANTS, "standard", {"linf": SMALL})
    handle = net.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].detach().clone()))
    result = AutoAttack()(net, x, y, threat, stop=stop)
    handle.remove()
    points = torch.cat(asked)
    points = points[threat.contains(points, x.expand_as(points))]
    margins, kept = (margin(net(p), Untargeted(y.expand(len(p)))) for p in (points, result.x_adv))
    assert not result.success.any()
    assert kept == margins.max()


def test_the_published_budgets():
    parts = AutoAttack().parts(Lp("linf", 0.1))
    assert [type(part).__name__ for part in parts] == ["APGD", "APGD", "FABT", "Square"]
    assert [getattr(part, "steps", None) for part in parts] == [100, 100, 100, None]
    assert (parts[1].target_classes, parts[2].target_classes, parts[3].queries) == (9, 9, 5000)
    sparse = AutoAttack().parts(Lp("l1", 1.0))
    assert (sparse[0].restarts, sparse[1].target_classes) == (5, 5)
    assert sparse[0].wide_start
    assert [part.eot for part in AutoAttack("rand").parts(Lp("l2", 1.0))] == [20, 20]
    with pytest.raises(ValueError, match="did you mean 'standard'"):
        AutoAttack("standart")


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("attack", [AutoAttack(), QuickAutoAttack()], ids=["auto", "quick"])
def test_few_classes(classes, attack, images):
    net = tiny_net(seed=3, classes=classes)
    y = predict(net, images)
    result = attack(net, images, y, Lp("linf", 0.3), max_queries=BUDGET)
    assert result.success.sum() >= 10
    assert torch.equal(predict(net, result.x_adv) != y, result.success)


@every_ball
def test_quick_finds_what_long_runs_towards_every_class_find(threat, images):
    for seed in range(2):
        net = tiny_net(seed=seed)
        y = predict(net, images)
        quick = QuickAutoAttack(queries=50)(net, images, y, threat)
        long = APGD(loss="dlr_targeted", restarts=2)(net, images, y, threat)
        assert (quick.success >= long.success).all()


@every_ball
def test_targets_are_ranked_by_their_distance_on_a_linear_model(threat):
    """There the estimate is exact: |z_y - z_t| / ||w_y - w_t||_dual."""
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(5, 16, generator=g, dtype=torch.float64) * torch.rand(5, 1, generator=g, dtype=torch.float64)
    x = torch.rand(8, 1, 4, 4, generator=g, dtype=torch.float64)

    def model(x):
        return x.flatten(1) @ weight.T

    y, logits = predict(model, x), model(x)
    with Oracle(model, x, Untargeted(y), threat) as oracle:
        clean, aims = QuickAutoAttack()._aims(oracle, x, Untargeted(y), threat)
        assert (oracle.forwards == 1 + 4).all()
    order = {"linf": 1, "l2": 2, "l1": float("inf")}[threat.norm]
    for i in range(len(x)):
        distance = {
            t: ((logits[i, y[i]] - logits[i, t]) / torch.linalg.vector_norm(weight[y[i]] - weight[t], ord=order)).item()
            for t in range(5)
            if t != y[i]
        }
        assert [aim.targets[i].item() for aim in aims] == sorted(distance, key=distance.__getitem__)
    assert torch.allclose(-clean, logits.topk(2, dim=1).values.diff(dim=1).abs().flatten())


def test_only_samples_that_came_close_go_on(net, images):
    y, threat = predict(net, images), Lp("linf", 0.02)
    hasty = QuickAutoAttack(close=0, rounds=3, queries=9)(net, images, y, threat)
    thorough = QuickAutoAttack(close=1, rounds=3, queries=9)(net, images, y, threat)
    stand = ~thorough.success
    assert stand.sum() >= 5
    first_round, later_round = 25 * 4, 25 * 5  # two or three targets, and the cross-entropy from near and from afar
    assert (hasty.backwards[stand] == 3 + first_round).all()
    assert (thorough.backwards[stand] == 3 + first_round + 3 * later_round).all()


@pytest.mark.parametrize(
    ("classes", "thirds"), [(2, [None] * 4), (3, [None] * 4), (4, [2] * 4), (5, [2, 3, 2, 3]), (8, [2, 3, 4, 5])]
)
def test_each_later_round_meets_the_nearest_targets_and_one_more(classes, thirds, monkeypatch):
    weight = torch.randn(classes, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def model(x):
        return x.flatten(1) @ weight.T

    rounds = []
    monkeypatch.setattr(QuickAutoAttack, "_round", lambda self, oracle, aims, *rest: rounds.append(aims))
    QuickAutoAttack(close=1, queries=1)(model, x, predict(model, x), Lp("linf", 1e-3))
    ranked = min(classes - 1, 2)
    nearest, later = rounds[0], rounds[1:]
    assert len(nearest) == ranked
    assert [aims[:ranked] for aims in later] == [nearest] * 4
    met = [aims[ranked].targets[0].item() if len(aims) > ranked else None for aims in later]
    with Oracle(model, x, Untargeted(predict(model, x)), Lp("linf", 1e-3)) as oracle:
        aims = QuickAutoAttack()._aims(oracle, x, oracle.goal, oracle.threat)[1]
    assert met == [None if place is None else aims[place].targets[0].item() for place in thirds]


@pytest.mark.parametrize(("norm", "searches"), [("linf", 0), ("l2", 1), ("l1", 1)])
def test_more_searches_from_noise_are_for_those_that_came_close(norm, searches, net, images):
    y, threat = predict(net, images), Lp(norm, 0.01)

    def backwards(close, restarts):
        attack = QuickAutoAttack(close=close, rounds=0, queries=9, far_steps=6, far_restarts=restarts)
        result = attack(net, images, y, threat)
        return result.backwards.where(~result.success, -1)

    stand = backwards(1, 3) > 0
    assert stand.sum() >= 5
    for restarts in (1, 3):
        once, again = (backwards(close, restarts)[stand] for close in (0, 1))
        assert (once == 3 + 4 * 25 + 6 * restarts * searches).all()
        assert (again - once == 6 * restarts * searches).all()


def test_its_second_searches_from_noise_begin_elsewhere(net, images, monkeypatch):
    drawn = []

    def search(self, oracle, rows, threat, streams):
        drawn.append(streams.take(rows).uniform(4))

    monkeypatch.setattr(FarFMN, "search", search)
    QuickAutoAttack(close=1, rounds=0, queries=9)(net, images, predict(net, images), Lp("l2", 0.01))
    first, second = drawn
    assert len(first) == len(second) >= 5
    assert (first != second).all()


def test_in_l2_and_l1_it_sees_across_a_flat_place():
    """Gradients are zero around the image; one pixel near white is enough for the other class."""

    def model(x):
        score = 3 * (x - 0.5).clamp_min(0).flatten(1).amax(dim=1)
        return torch.stack([torch.ones_like(score), score], dim=1)

    x, y = torch.full((6, 1, 4, 4), 0.2, dtype=torch.float64), torch.zeros(6, dtype=torch.int64)
    for norm in ("l2", "l1"):
        assert QuickAutoAttack(queries=1)(model, x, y, Lp(norm, 0.8)).success.all()  # 1/2 + 1/3 - 0.2 = 0.633
        assert not QuickAutoAttack(queries=1)(model, x, y, Lp(norm, 0.63)).success.any()


def test_a_targeted_goal_needs_no_ranking(net, images):
    target = (predict(net, images) + 1) % 4
    result = QuickAutoAttack()(net, images, Targeted(target), Lp("linf", 0.4), max_queries=BUDGET)
    assert result.success.sum() >= 6
    assert torch.equal(predict(net, result.x_adv) == target, result.success)


def test_bad_settings_say_what_is_wrong():
    for options, message in [
        ({"steps": 0}, "steps must be a whole number"),
        ({"rounds": -1}, "rounds must be a whole number"),
        ({"close": -0.1}, "close must be at least 0"),
        ({"queries": 0}, "queries must be"),
        ({"far_restarts": 0}, "far_restarts must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            QuickAutoAttack(**options)


@pytest.mark.slow
def test_quick_agrees_with_the_ensemble_on_an_adversarially_trained_net(shared_data):
    from robustbench_lite.data import load_data
    from robustbench_lite.zoo import load_defense

    data, net = load_data("mnist", data_dir=shared_data), load_defense("mnist/pgd_at_0.3")
    x, y, threat = data.images[:24], data.labels[:24], Lp("linf", 0.3)
    whole, quick = (attack(net, x, y, threat, max_queries=1500).success for attack in (AutoAttack(), QuickAutoAttack()))
    assert 1 <= whole.sum() < 24
    assert abs(int(whole.sum()) - int(quick.sum())) <= 1
