"""Auto-PGD: its schedule against the paper's rule written out, its moves against closed forms, its targets."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import pytest
import torch
from torch import nn

from robustbench_lite.attacks import APGD, PGD
from robustbench_lite.attacks._apgd_rules import rule_for
from robustbench_lite.attacks._apgd_schedule import Halving, Sparsity, checkpoints
from robustbench_lite.attacks._targets import LOSSES, Towards, likeliest_targets
from robustbench_lite.core.goals import Targeted, Untargeted
from robustbench_lite.core.losses import dlr, margin
from robustbench_lite.core.models import predict
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.threats import Lp
from tests.conftest import tiny_net

BALLS = [Lp("linf", 0.1), Lp("l2", 0.5), Lp("l1", 2.0)]
every_ball = pytest.mark.parametrize("threat", BALLS, ids=lambda threat: threat.norm)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def published_checkpoints(steps):
    """Section 3 of the paper, in exact arithmetic."""
    p = [Fraction(0), Fraction(22, 100)]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - Fraction(3, 100), Fraction(6, 100)))
    return sorted({w for w in (ceil(share * steps) for share in p[1:]) if w < steps})


@pytest.mark.parametrize("steps", [1, 2, 5, 7, 10, 20, 33, 40, 50, 99, 100, 137, 1000])
def test_checkpoints_are_those_of_the_paper(steps):
    assert checkpoints(steps) == published_checkpoints(steps)


def test_checkpoints_of_a_hundred_steps():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


def published_sizes(losses, steps, rho):
    """Step sizes and restarts of one sample, from its losses f(x_0), f(x_1), ..., by the rule as the paper states it.

    A restart puts the best point in the place of the iterate, so the next comparison is with the best loss.
    """
    size, last, sizes, restarts = 1.0, 0, [], []
    came_from, best = losses[0], [losses[0]]
    halved_at = {0: False}
    rises = []
    for k in range(1, steps):
        rises.append(losses[k] > came_from)
        best.append(max(best[-1], losses[k]))
        came_from = losses[k]
        restart = False
        if k in published_checkpoints(steps):
            first = sum(rises[last:k]) < rho * (k - last)
            second = not halved_at[last] and best[last] == best[k]
            restart = first or second
            size, halved_at[k], last = size / 2 if restart else size, restart, k
            came_from = best[-1] if restart else came_from
        sizes.append(size)
        restarts.append(restart)
    return sizes, restarts


def walks(steps, count=40):
    """Losses that drift upwards by different amounts, so that some samples stall early, some late, some never."""
    drift = torch.linspace(-0.2, 1.0, count, dtype=torch.float64)
    noise = torch.randn(steps, count, generator=generator(), dtype=torch.float64)
    walk = (drift + 0.5 * noise).cumsum(dim=0)
    walk[:, 0] = 1.0  # constant: never rises
    walk[10:, 1] = walk[10, 1]  # stalls for good
    return walk


@pytest.mark.parametrize("steps", [25, 100])
@pytest.mark.parametrize("rho", [0.5, 0.75])
def test_step_sizes_are_those_of_the_paper(steps, rho):
    losses = walks(steps)
    schedule = Halving(torch.ones(losses.shape[1], 1, 1, 1, dtype=torch.float64), steps, rho)
    came_from = best = losses[0]
    assert schedule.record(None, best, 0) is None
    sizes, restarts = [], []
    for k in range(1, steps):
        value = losses[k]
        rose, best = value > came_from, torch.maximum(best, value)
        restart = schedule.record(rose, best, k)
        stalled = torch.zeros_like(rose) if restart is None else restart
        came_from = torch.where(stalled, best, value)
        sizes.append(schedule.size.flatten())
        restarts.append(stalled)
    for i in range(losses.shape[1]):
        expected, when = published_sizes(losses[:, i].tolist(), steps, rho)
        assert torch.stack(sizes)[:, i].tolist() == expected
        assert torch.stack(restarts)[:, i].tolist() == when
    assert len(torch.stack(sizes)[-1].unique()) > 3  # the walks are of many kinds


def test_samples_that_leave_do_not_change_the_schedule_of_the_others():
    losses, steps = walks(100), 100
    stay = torch.arange(0, losses.shape[1], 3)
    part = Halving(torch.ones(len(stay), 1, 1, 1), steps, 0.75)
    whole = Halving(torch.ones(losses.shape[1], 1, 1, 1), steps, 0.75)
    best = losses[0]
    for k in range(steps):
        best = torch.maximum(best, losses[k])
        rose = losses[k] > losses[k - 1] if k else None
        if k == 35:
            whole.take(stay)
        whole_sees = slice(None) if k < 35 else stay
        whole.record(None if rose is None else rose[whole_sees], best[whole_sees], k)
        part.record(None if rose is None else rose[stay], best[stay], k)
    assert torch.equal(whole.size, part.size)


def test_sparsity_follows_the_best_point():
    x = torch.zeros(3, 1, 10, 10)
    schedule = Sparsity(torch.full((3, 1, 1, 1), 9.0), steps=100, coordinates=100)
    assert schedule.moved.tolist() == [20, 20, 20]
    best = x.clone()
    best[0, 0, :3] = 0.1  # 30 coordinates
    best[1] = 0.1  # all of them
    best[2, 0, 0, 0] = 0.1  # one
    assert schedule.record(best, x, 3) is None
    assert schedule.record(best, x, 4).tolist() == [True, False, True]
    assert schedule.moved.tolist() == [20, 66, 1]
    assert schedule.size.flatten().tolist() == [9.0, 6.0, 9.0]
    for step in range(5, 41):
        restart = schedule.record(best, x, step)
        assert restart is None or not restart.any()  # no sparser than before
    assert schedule.size.flatten().tolist() == pytest.approx([0.9, 0.9, 0.9])  # a tenth of the longest, at the least


def test_a_first_linf_step_goes_to_the_corner_of_the_box():
    x = torch.rand(5, 1, 4, 4, generator=generator(), dtype=torch.float64)
    threat, gradient = Lp("linf", 0.1), torch.randn(5, 1, 4, 4, generator=generator(1), dtype=torch.float64)
    rule = rule_for(threat, x, x, steps=100, rho=0.75, resumed=False)
    first = rule.move(x, gradient)
    corner = (x + 0.1 * gradient.sign()).clamp(0, 1)
    assert torch.allclose(first, corner, atol=1e-12)
    second = rule.move(first, -gradient)
    other = (x - 0.1 * gradient.sign()).clamp(0, 1)
    momentum = first + 0.75 * (other - first) + 0.25 * (first - x)
    assert torch.allclose(second, momentum.clamp(x - 0.1, x + 0.1).clamp(0, 1), atol=1e-12)


def test_a_sparse_step_moves_the_largest_gradients_that_can_move():
    x = torch.full((1, 1, 3, 3), 0.5, dtype=torch.float64)
    x[0, 0, 0, 0] = 1.0  # its gradient is largest, and points out of the box
    gradient = torch.tensor([[[[9.0, -8.0, 7.0], [1, 1, 1], [1, 1, 1]]]], dtype=torch.float64)
    rule = rule_for(Lp("l1", 0.4), x, x, steps=100, rho=0.75, resumed=False)
    moved = rule.move(x, gradient) - x  # a fifth of nine coordinates: one
    assert moved.flatten().tolist() == pytest.approx([0, -0.4, 0, 0, 0, 0, 0, 0, 0])


def test_l1_reaches_the_vertex_that_a_linear_model_asks_for(images):
    """On a linear margin the best l1 change fills the box of the best coordinates one by one: a greedy closed form."""
    weight = torch.randn(36, generator=generator(5), dtype=torch.float64)

    def model(x):
        score = x.flatten(1) @ weight
        return torch.stack([score * 0, -score + 40], dim=1)

    eps, y = 2.5, torch.ones(len(images), dtype=torch.int64)
    result = APGD(steps=100, loss="margin")(model, images, y, Lp("l1", eps), stop="never")
    room = torch.where(weight > 0, 1 - images.flatten(1), images.flatten(1))
    order = weight.abs().argsort(descending=True)
    sorted_room = room[:, order]
    spent = (sorted_room.cumsum(dim=1) - sorted_room).clamp_max(eps)
    best = (torch.minimum(sorted_room, eps - spent) * weight.abs()[order]).sum(dim=1)
    gained = (result.x_adv - images).flatten(1) @ weight
    assert (gained <= best + 1e-9).all()
    assert (gained > 0.98 * best).all()


@every_ball
def test_every_point_put_to_the_model_lies_in_the_ball(threat, net, images):
    y, seen = predict(net, images), []
    eps = torch.linspace(0.2, 1, len(images), dtype=torch.float64) * threat.eps
    own = Lp(threat.norm, eps)
    wide = APGD(steps=20, wide_start=True)(net, images, y, own, stop="never")
    assert own.contains(wide.x_adv, images).all()  # it leaves the ball for a while, and nothing it finds there counts
    net.register_forward_hook(lambda _, args, logits: seen.append(args[0].detach()))
    attack = APGD(steps=20, restarts=2, loss="dlr_targeted", target_classes=2)
    attack(net, images, y, own, stop="never")
    assert len(seen) > 80
    assert all(own.contains(points, images).all() for points in seen)


@every_ball
def test_a_radius_for_each_sample_is_that_samples_own_threat(threat, net, images):
    y = predict(net, images)
    eps = torch.linspace(0.1, 1, len(images), dtype=torch.float64) * threat.eps
    together = APGD(steps=15)(net, images, y, Lp(threat.norm, eps), generator=generator())
    for i in (0, 7, 11):
        alone = APGD(steps=15)(
            net, images[i : i + 1], y[i : i + 1], Lp(threat.norm, float(eps[i])), indices=torch.tensor([i]),
            generator=generator(),
        )  # fmt: skip
        assert torch.allclose(alone.x_adv[0], together.x_adv[i], atol=1e-9)
        assert alone.success[0] == together.success[i]


@every_ball
def test_the_best_loss_never_falls_and_is_what_comes_back(threat, net, images, monkeypatch):
    from robustbench_lite.attacks import _apgd_climb

    y, history = predict(net, images), []
    remember = _apgd_climb.Climb._remember

    def spy(self, value, gradient):
        remember(self, value, gradient)
        history.append(self._best_value)

    monkeypatch.setattr(_apgd_climb.Climb, "_remember", spy)
    result = APGD(steps=30)(net, images, y, threat, stop="never")
    rising = torch.stack(history)
    assert (rising.diff(dim=0) >= 0).all()
    failed = ~result.success
    final = LOSSES["ce"](net(result.x_adv), Untargeted(y))
    assert torch.allclose(final[failed], rising[-1][failed])


@every_ball
def test_it_is_about_as_strong_as_plain_pgd_with_restarts(threat, net, images):
    y = predict(net, images)
    auto = APGD(steps=50)(net, images, y, threat).success
    plain = PGD(steps=50, restarts=3)(net, images, y, threat).success
    assert auto.sum() >= plain.sum()


def test_a_wide_start_spends_its_steps_in_three_balls(net, images):
    y, seen = predict(net, images), []
    net.register_forward_hook(lambda _, args, logits: seen.append((args[0].detach() - images).flatten(1).abs().sum(1)))
    APGD(steps=10, wide_start=True)(net, images, y, Lp("l1", 0.5), stop="never")
    longest = torch.stack(seen[1:]).amax(dim=1).tolist()
    assert len(longest) == 10 + 3  # each search also evaluates the point of its last step
    assert 1.0 < max(longest[:4]) <= 1.5 + 1e-6
    assert 0.5 < max(longest[4:8]) <= 1.0 + 1e-6
    assert max(longest[8:]) <= 0.5 + 1e-6


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "ce_targeted", "margin_targeted", "dlr_targeted"])
def test_few_classes(classes, loss, images):
    net = tiny_net(seed=3, classes=classes)
    y = predict(net, images)
    result = APGD(steps=20, loss=loss)(net, images, y, Lp("linf", 0.4))
    assert result.success.sum() >= 10
    untouched = APGD(steps=3, loss=loss)(net, images, y, Lp("linf", 1e-6))
    runs = classes - 1 if loss.endswith("_targeted") else 1
    assert untouched.backwards.tolist() == [3 * runs] * 12
    assert untouched.forwards.tolist() == [1 + 4 * runs + loss.endswith("_targeted")] * 12


def test_the_ratio_is_the_published_one_where_there_are_classes_enough():
    logits = torch.randn(9, 5, generator=generator(), dtype=torch.float64) * 3
    y, t = torch.arange(9) % 5, (torch.arange(9) + 2) % 5
    ratio = LOSSES["dlr"]
    assert torch.allclose(ratio(logits, Untargeted(y)), dlr(logits, Untargeted(y)))
    assert torch.allclose(ratio(logits, Targeted(t)), dlr(logits, Targeted(t)))
    for row, label, target, value in zip(logits, y, t, ratio(logits, Towards(y, t)), strict=True):
        z = sorted(row.tolist(), reverse=True)
        expected = -(row[label] - row[target]) / (z[0] - (z[2] + z[3]) / 2)
        assert value.item() == pytest.approx(expected.item())
    three = logits[:, :3]
    y, t = y % 3, (y + 1) % 3
    spread = three.amax(dim=1) - three.amin(dim=1)
    assert torch.allclose(
        ratio(three, Towards(y, t)), (three.gather(1, t[:, None]) - three.gather(1, y[:, None]))[:, 0] / spread
    )
    two = logits[:, :2]
    assert torch.equal(ratio(two, Untargeted(y % 2)), margin(two, Untargeted(y % 2)))


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_losses_towards_a_target_do_not_see_the_others_move(loss):
    """Towards t, the numerator has z_t and z_y alone; the goal stays any wrong class."""
    logits = torch.tensor([[5.0, 1.0, 3.0, 2.0]], dtype=torch.float64)
    goal = Towards(torch.tensor([0]), torch.tensor([1]))
    higher = logits + torch.tensor([[0.0, 0.1, 0.0, 0.0]])
    assert LOSSES[loss](higher, goal) > LOSSES[loss](logits, goal)
    assert goal.achieved(torch.tensor([2])).item()
    assert isinstance(goal.take(slice(0, 1)), Towards)


def test_targets_come_in_the_order_of_the_clean_logits():
    logits = torch.tensor([[0.0, 4, 2, 3], [9.0, 1, 2, 3]])
    assert likeliest_targets(logits, torch.tensor([1, 3]), 9).tolist() == [[3, 2, 0], [0, 2, 1]]
    assert likeliest_targets(logits, torch.tensor([1, 3]), 2).tolist() == [[3, 2], [0, 2]]


def test_a_targeted_goal_is_reached_at_the_target_alone(net, images):
    target = (predict(net, images) + 1) % 4
    for loss in ("ce", "dlr", "dlr_targeted"):
        result = APGD(steps=30, loss=loss)(net, images, Targeted(target), Lp("linf", 0.4))
        assert result.success.sum() >= 6
        assert torch.equal(predict(net, result.x_adv) == target, result.success)


class Noisy(nn.Module):
    """Fresh noise on the input at each call: its single gradients say little."""

    stochastic = True

    def __init__(self, net):
        super().__init__()
        self.net, self.noise = net, torch.Generator().manual_seed(0)

    def forward(self, x):
        return self.net(x + 0.3 * torch.randn(x.shape, generator=self.noise, dtype=x.dtype))


def test_several_gradients_an_iterate_help_on_a_noisy_net_and_are_paid_for(images):
    net = tiny_net(seed=4)
    y, threat = predict(net, images), Lp("l2", 0.7)
    values = {}
    for eot in (1, 20):
        result = APGD(steps=15, eot=eot)(Noisy(net), images, y, threat, stop="never")
        assert (result.backwards == 15 * eot).all()
        assert (result.forwards >= 1 + 15 * eot + 1).all()
        values[eot] = LOSSES["ce"](net(result.x_adv), Untargeted(y)).mean()
    assert values[20] > values[1]


def test_restarts_start_elsewhere(net, images):
    y, starts = predict(net, images), []
    net.register_forward_hook(lambda _, args, logits: starts.append(args[0].detach()))
    APGD(steps=1, restarts=2)(net, images, y, Lp("linf", 1e-3))
    _, first, _, second, _ = starts
    assert not torch.equal(first, second)
    assert torch.allclose(
        (first - images).abs().amax(dim=(1, 2, 3)), torch.tensor(1e-3, dtype=torch.float64), atol=1e-9
    )


def test_bad_settings_say_what_is_wrong():
    for options, message in [
        ({"steps": 0}, "steps must be a whole number"),
        ({"eot": 1.5}, "eot must be a whole number"),
        ({"restarts": 0}, "restarts must be"),
        ({"target_classes": 0}, "target_classes must be"),
        ({"rho": 0}, "rho must be in"),
        ({"loss": "dlrr"}, "did you mean 'dlr'"),
    ]:
        with pytest.raises(ValueError, match=message):
            APGD(**options)


def test_it_finds_what_the_view_shows_and_the_model_confirms(net, images):
    y = predict(net, images)
    with Oracle(net, images, Untargeted(y), Lp("linf", 0.3), view=net) as oracle:
        assert oracle.gradient_cost == 1
    view = tiny_net(seed=0)
    result = APGD(steps=20)(net, images, y, Lp("linf", 0.3), view=view)
    assert torch.equal(predict(net.eval(), result.x_adv) != y, result.success)
    assert result.success.sum() > 6


@pytest.mark.slow
def test_on_an_adversarially_trained_net_it_beats_plain_pgd(shared_data):
    from robustbench_lite.data import load_data
    from robustbench_lite.zoo import load_defense

    data, net = load_data("mnist", data_dir=shared_data), load_defense("mnist/pgd_at_0.3")
    x, y, threat = data.images[:64], data.labels[:64], Lp("linf", 0.3)
    plain = PGD(steps=40)(net, x, y, threat).success
    auto = APGD(steps=40)(net, x, y, threat).success
    assert auto.sum() >= plain.sum()
    fewer = APGD(steps=40, loss="dlr_targeted", target_classes=2)(net, x, y, threat)
    assert fewer.success.sum() >= plain.sum()
