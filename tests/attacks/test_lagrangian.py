"""The Lagrangian attack: it comes to the budget, and to the best point of the ball where that is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustbench_lite.attacks import PGD, LagrangianAttack
from robustbench_lite.core.goals import Targeted, Untargeted
from robustbench_lite.core.losses import margin
from robustbench_lite.core.models import predict
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp


class LastAsked(Oracle):
    """Remembers the points of the last gradient: where the search ended, before any projection."""

    def gradient(self, points, *args, **kwargs):
        self.last = points
        return super().gradient(points, *args, **kwargs)


def search(attack, net, x, y, threat):
    with LastAsked(net, x, Untargeted(y), threat, stop="never") as oracle:
        oracle.judge_clean()
        attack.run(oracle, x, oracle.goal, threat, Streams.from_generator(None, torch.arange(len(x))))
    return oracle


@pytest.mark.parametrize("rho", [0.25, 4.0])
@pytest.mark.parametrize("eps", [0.2, 1.0])
def test_dual_ascent_comes_to_the_budget(rho, eps, net, images):
    threat = Lp("l2", eps)
    oracle = search(LagrangianAttack(rho=rho), net, images, predict(net, images), threat)
    assert ((threat.distance(oracle.last, images) / eps - 1).abs() <= 0.05).all()


def test_each_sample_comes_to_its_own_budget(net, images):
    eps = torch.linspace(0.1, 1.5, 12, dtype=torch.float64)
    oracle = search(LagrangianAttack(), net, images, predict(net, images), Lp("l2", eps))
    distance = (oracle.last - images).flatten(1).norm(dim=1)
    assert ((distance / eps - 1).abs() <= 0.05).all()


def test_on_a_linear_model_it_attains_the_largest_margin_of_the_ball():
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(2, 16, generator=generator))
    x = torch.rand(10, 1, 4, 4, dtype=torch.float64, generator=generator)
    y = predict(net, x)
    result = LagrangianAttack()(net, x, y, Lp("l2", 0.5, bounds=(-9.0, 9.0)), stop="never")
    slope = (net[1].weight[0] - net[1].weight[1]).detach().norm()
    with torch.no_grad():
        gain = margin(net(result.x_adv), Untargeted(y)) - margin(net(x), Untargeted(y))
    assert torch.allclose(gain, 0.5 * slope.expand(10), rtol=0.02)


def test_the_scale_of_the_logits_does_not_matter(net, images):
    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.net, self.scale = net, scale

        def forward(self, x):
            return self.scale * self.net(x)

    y, attack = predict(net, images), LagrangianAttack(loss="margin")
    small, large = (attack(Scaled(scale), images, y, Lp("l2", 0.4)) for scale in (0.01, 100.0))
    assert torch.allclose(small.x_adv, large.x_adv, atol=1e-6)


def test_it_is_no_weaker_than_pgd_with_restarts(net, images):
    y = predict(net, images)
    for eps in (0.2, 0.4):
        ours, pgd = (attack(net, images, y, Lp("l2", eps)).success for attack in (LagrangianAttack(), PGD(restarts=5)))
        assert ours.sum() >= pgd.sum()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "eps"), [("standard", 1.0), ("pgd_at_0.3", 2.0)])
def test_on_mnist_it_keeps_to_the_budget_and_up_with_pgd(name, eps, shared_data):
    import numpy as np

    from robustbench_lite.zoo import load_defense

    with np.load(shared_data / "mnist.npz") as file:
        x = torch.from_numpy(file["x_test"][:60]).float().unsqueeze(1) / 255
        y = torch.from_numpy(file["y_test"][:60]).long()
    net, threat = load_defense(f"mnist/{name}").eval(), Lp("l2", eps)
    oracle = search(LagrangianAttack(), net, x, y, threat)
    assert ((threat.distance(oracle.last, x) / eps - 1).abs() <= 0.05).double().mean() >= 0.95
    ours, pgd = (
        attack(net, x, y, threat).success.double().mean()
        for attack in (LagrangianAttack(restarts=2), PGD(steps=100, restarts=2))
    )
    assert ours >= pgd - 0.03


def test_targets_are_reached(net, images):
    target = (predict(net, images) + 1) % 4
    result = LagrangianAttack(restarts=2)(net, images, Targeted(target), Lp("l2", 3.0))
    assert result.success.double().mean() >= 0.9


def test_bad_hyper_parameters_say_what_is_wrong():
    for options, message in [
        ({"steps": 0}, "steps must be a whole number"),
        ({"restarts": 0}, "restarts must be a whole number"),
        ({"step_size": 2.0}, "share of eps"),
        ({"rho": 0.0}, "rho must be > 0"),
        ({"loss": "cee"}, "did you mean 'ce'"),
    ]:
        with pytest.raises(ValueError, match=message):
            LagrangianAttack(**options)
