"""LocalVariance: its first step by hand, its own norm's budget, and the contract of attacks on weighted balls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from robustbench_lite.attacks import PGD, LocalVariance
from robustbench_lite.attacks.local_variance import probability_gap
from robustbench_lite.core.goals import Targeted, Untargeted
from robustbench_lite.core.losses import margin
from robustbench_lite.core.models import predict
from robustbench_lite.core.threats import Lp
from robustbench_lite.core.weighted import WeightedLp, local_deviation

BALL = WeightedLp("l1", 12.0)


class Steps(PGD):
    """PGD that may step in any threat with a steepest direction."""

    def supports(self, threat):
        return True


def in_ball(attack, net, images, y, ball, **options):
    """Attack with the weights of the images kept, which steepest steps need."""
    return attack(net, images, y, ball.around(images), **options)


@pytest.fixture
def y(net, images):
    return predict(net, images)


@pytest.fixture
def linear():
    """Two classes, logits (0, <w, x> + b)."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).double()
    weight = torch.randn(36, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        net[1].weight.copy_(torch.stack([torch.zeros_like(weight), weight]))
        net[1].bias.copy_(torch.tensor([0.0, -3.0]))
    return net


def test_the_first_step_takes_the_pixels_of_highest_priority(linear, images):
    x, w = images[:1] * 0.8 + 0.1, linear[1].weight[1].detach()
    label = predict(linear, x)
    sign = 1 if label == 0 else -1
    priority = w.abs() * local_deviation(x).clamp_min(1 / 255).flatten()
    top = priority.topk(3).indices
    expected = x.flatten().clone()
    expected[top] += 0.05 * sign * w[top].sign()
    found = LocalVariance(steps=1, pixels=3, step_size=0.05)(linear, x, label, BALL, stop="never").x_adv
    assert torch.allclose(found.flatten(), expected)


def test_it_spends_the_budget_where_a_unit_of_distance_buys_most(linear, images):
    """On a linear model with small steps it is the steepest direction of the weighted l1 ball, pixel after pixel."""
    x, w = images * 0.5 + 0.25, linear[1].weight[1].detach()
    label = predict(linear, x)
    ball = WeightedLp("l1", 0.4)
    result = LocalVariance(steps=40, pixels=1, step_size=0.01)(linear, x, label, ball, stop="never")
    gain = ((result.x_adv - x).flatten(1) @ w) * torch.where(label == 0, 1.0, -1.0)
    best = (w.abs() * local_deviation(x).clamp_min(1 / 255).flatten(1)).amax(dim=1) * 0.4
    assert torch.allclose(gain, best, atol=1e-6)
    assert torch.allclose(ball.distance(result.x_adv, x), torch.full((12,), 0.4, dtype=torch.float64), atol=1e-6)


def test_the_gap_has_a_gradient_where_the_model_is_sure():
    logits = torch.tensor([[40.0, 0.0, -3.0]], requires_grad=True)
    probability_gap(logits, Untargeted(torch.tensor([0]))).sum().backward()
    assert logits.grad[0, 0] < 0 < logits.grad[0, 1]
    rows, labels = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 4
    for goal in (Untargeted(labels), Targeted(labels)):
        assert torch.allclose(probability_gap(rows, goal), margin(rows.double().softmax(dim=1), goal))


@pytest.mark.parametrize("attack", [LocalVariance(), Steps(steps=20)], ids=["greedy", "pgd"])
@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_the_contract_holds_on_weighted_balls(attack, norm, net, images, y):
    ball = WeightedLp(norm, {"l1": 12.0, "l2": 4.0, "linf": 1.5}[norm])
    if not attack.supports(ball):
        with pytest.raises(ValueError, match="does not support"):
            attack(net, images, y, ball)
        return
    y[0] = (y[0] + 1) % 4
    whole = in_ball(attack, net, images, y, ball)
    assert ball.contains(whole.x_adv, images).all()
    assert whole.success.sum() > 3
    assert torch.equal(predict(net.eval(), whole.x_adv) != y, whole.success)
    assert (whole.forwards[0], whole.backwards[0], whole.distance[0]) == (1, 0, 0)
    for i in range(4):
        one = slice(i, i + 1)
        alone = in_ball(attack, net, images[one], y[one], ball, indices=torch.tensor([i]))
        assert torch.allclose(alone.x_adv, whole.x_adv[one], atol=1e-9)
        assert torch.equal(alone.forwards, whole.forwards[one])
    assert in_ball(attack, net, images, y, replace(ball, eps=ball.eps / 8)).success.sum() <= whole.success.sum()
    for budget in (1, 2, 7):
        assert in_ball(attack, net, images, y, ball, max_queries=budget).forwards.max() <= budget
    target = (y + 1) % 4
    aimed = in_ball(attack, net, images, Targeted(target), ball)
    assert torch.equal(predict(net.eval(), aimed.x_adv) == target, aimed.success)


def test_passes_are_what_a_spy_counts(net, images, y):
    seen = []
    net.register_forward_hook(lambda _, args, logits: seen.append(len(logits)))
    result = LocalVariance()(net, images, y, BALL)
    assert sum(seen) == result.forwards.sum()


def test_without_a_budget_it_goes_on_to_the_end_or_to_success(net, images, y):
    free = LocalVariance(pixels=2)(net, images, y, WeightedLp("l1", None))
    bounded = LocalVariance(pixels=2)(net, images, y, BALL)
    assert free.success.sum() >= bounded.success.sum()
    assert free.success.sum() > 3


def test_a_flat_model_ends_the_search_at_once(images):
    def constant(x):
        return torch.zeros(len(x), 3).to(x) + x.flatten(1).sum(dim=1, keepdim=True) * 0

    result = LocalVariance()(constant, images, torch.zeros(12, dtype=torch.int64), BALL)
    assert not result.success.any()
    assert result.forwards.max() <= 3


def test_bad_settings_say_what_is_wrong(net, images, y):
    for build, message in [
        (lambda: LocalVariance(steps=0), "steps must be a whole number"),
        (lambda: LocalVariance(pixels=1.5), "pixels must be a whole number"),
        (lambda: LocalVariance(step_size=0), "step_size must be > 0"),
        (lambda: LocalVariance()(net, images, y, Lp("l1", 1)), "does not support"),
        (lambda: LocalVariance()(net, images, y, WeightedLp("l1", 1e9)), "wider than the whole image range"),
    ]:
        with pytest.raises(ValueError, match=message):
            build()
