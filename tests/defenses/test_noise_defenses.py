"""Noise on inputs and weights: what one draw is, and that an attacker who knows of it is not kept out."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from scipy.stats import kstest, norm
from torch import Tensor, nn

from robustbench_lite.attacks import PGD, Transfer
from robustbench_lite.core.models import predict
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.data.base import Dataset
from robustbench_lite.defenses import InputNoise, StandardTraining, WeightNoise
from robustbench_lite.training import train


def linear() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 400), nn.ReLU(), nn.Linear(400, 3)).eval()


def images(n: int = 5) -> Tensor:
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def test_input_noise_is_normal_and_new_for_each_image() -> None:
    seen: list[Tensor] = []
    net = linear()
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = images(200)
    torch.manual_seed(0)
    InputNoise(net, 0.3).draw(x)
    assert kstest(((seen[0] - x) / 0.3).flatten().double().numpy(), norm.cdf).pvalue > 1e-3


def test_weight_noise_is_relative_to_each_layers_spread_new_at_each_call_and_leaves_the_net_alone() -> None:
    net, x, seen, biases = linear(), images(2), [], []
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net[1].register_forward_hook(lambda part, *_: seen.append(part.weight.detach().clone()))
    net[1].register_forward_hook(lambda part, *_: biases.append(part.bias.detach().clone()))
    defense = WeightNoise(net, 0.2).eval()
    torch.manual_seed(0)
    one, two = defense.draw(x), defense.draw(x)
    assert not torch.allclose(one, two)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    noise = (seen[0] - before["1.weight"]) / before["1.weight"].std() / 0.2
    assert kstest(noise.flatten().double().numpy(), norm.cdf).pvalue > 1e-3
    assert not torch.equal(seen[0], seen[1])
    assert all(torch.equal(bias, before["1.bias"]) for bias in biases)


def test_the_images_of_a_call_meet_one_draw_of_the_weights() -> None:
    torch.manual_seed(0)
    defense = WeightNoise(linear(), 0.3, draws=4)
    same = images(1).expand(3, -1, -1, -1)
    for block in defense.answers(same, 4):
        assert block.shape == (1, 3, 3)
        assert torch.allclose(block[0, 0], block[0, 2], atol=1e-6)


@pytest.mark.parametrize("make", [lambda n, d: InputNoise(n, 0.5, d), lambda n, d: WeightNoise(n, 0.5, d)])
def test_a_vote_is_steadier_than_a_draw(make: Callable[[nn.Module, int], Any]) -> None:
    x = images(60)
    torch.manual_seed(0)
    changed = []
    for draws in (1, 41):
        defense = make(linear(), draws)
        answers = torch.stack([predict(defense, x) for _ in range(12)])
        changed.append(float((answers != answers.mode(dim=0).values).double().mean()))
    assert changed[0] > 2 * changed[1]


def test_gradients_reach_the_input_through_noisy_weights() -> None:
    x = images().requires_grad_()
    view = WeightNoise(linear(), 0.2).attack_view(6)
    assert view.cost == 6
    slope = torch.autograd.grad(view(x)[:, 0].sum(), x)[0]
    assert (slope.flatten(1).norm(dim=1) > 0).all()


@cache
def digits() -> tuple[nn.Module, Dataset]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    data = load_data("digits", "train")
    return train(net, data, StandardTraining(), epochs=15, learning_rate=5e-3), load_data("digits", "test").head(80)


@pytest.mark.parametrize(
    "make", [lambda n: InputNoise(n, 0.15), lambda n: WeightNoise(n, 0.3)], ids=["InputNoise", "WeightNoise"]
)
def test_it_looks_better_than_it_is(make: Callable[[nn.Module], Any]) -> None:
    """Examples for the bare net lose some of their force; an attack on the mean over draws is as good as ever."""
    net, data = digits()
    defense, threat = make(net).eval(), Lp("linf", 0.2)
    x, y = data.images, data.labels
    torch.manual_seed(0)
    assert (predict(defense, x) == y).double().mean() > 0.85
    transferred = Transfer(PGD(steps=10), net)(defense, x, y, threat).success.double().mean()
    direct = PGD(steps=10)(defense, x, y, threat, view=defense.attack_view(10)).success.double().mean()
    assert direct > 0.9
    assert direct >= transferred


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("sigma", lambda: InputNoise(linear(), 0)),
        ("draws", lambda: InputNoise(linear(), 0.1, draws=0)),
        ("scale", lambda: WeightNoise(linear(), -0.1)),
        ("stochastic", lambda: WeightNoise(InputNoise(linear(), 0.1), 0.1)),
    ],
)
def test_bad_arguments_are_refused(message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        make()
