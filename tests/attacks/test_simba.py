"""SimBA: its directions, its steps, and linear models, where the best it can do is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustbench_lite.attacks import DCT, Pixels, SimBA, Tiles
from robustbench_lite.attacks.simba import _Directions
from robustbench_lite.core.goals import Targeted
from robustbench_lite.core.models import predict
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp


class Recorder(nn.Module):
    """A net that remembers what it is asked."""

    def __init__(self, net):
        super().__init__()
        self.net, self.asked = net, []

    def forward(self, x):
        self.asked.append(x.clone())
        return self.net(x)


def linear(bias, size=16, seed=0):
    """Two classes, logits +-(w.(x - 1/2) + bias) / 2."""
    w = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def model(x):
        score = (x.flatten(1) - 0.5) @ w + bias
        return torch.stack([score / 2, -score / 2], dim=1)

    return model, w


@pytest.mark.parametrize("basis", [Pixels(), DCT(0.5), Tiles(2)])
def test_directions_are_decoded_unit_coefficients(basis):
    x = torch.rand(1, 3, 5, 8, dtype=torch.float64)
    directions = _Directions(basis, x)
    count = basis.size((3, 5, 8))
    assert directions.count == count
    every = directions(torch.arange(count))
    assert torch.allclose(every, basis.decode(torch.eye(count, dtype=torch.float64), (3, 5, 8)), atol=1e-12)


def test_orders_are_permutations_of_each_sample():
    directions = _Directions(Pixels(), torch.rand(1, 1, 6, 6))
    orders = directions.shuffle(Streams.from_generator(None, torch.arange(4)))
    assert (orders.sort(dim=1).values == torch.arange(36)).all()
    assert (orders[0] != orders[1]).any()


def test_on_a_linear_model_each_direction_is_stepped_along_once_the_right_way():
    """The loss falls one way and rises the other: after all m directions the change is step * sign(w)."""
    model, w = linear(bias=100)
    x = torch.full((5, 1, 4, 4), 0.5, dtype=torch.float64)
    net = Recorder(model)
    # The clean score; one query for each weight that a step down serves, two for each that it does not.
    attack = SimBA(step=0.01, queries=1 + 16 + int((w < 0).sum()))
    result = attack(net, x, torch.zeros(5, dtype=torch.int64), Lp("l2", None))
    assert not result.success.any()
    loss = [model(asked)[:, 1] - model(asked)[:, 0] for asked in net.asked[1:]]
    best = torch.stack(loss).cummax(dim=0).values
    assert torch.allclose(best[-1], best[0] + 0.01 * w.abs().sum(), atol=1e-9)
    assert ((best[1:] - best[:-1]) >= 0).all()


def test_steps_have_the_length_given_and_failures_are_taken_back(net, images):
    y = predict(net, images)
    recorder = Recorder(net)
    x = images.clamp(0.3, 0.7)
    SimBA(step=0.1, queries=30)(recorder, x, y, Lp("l2", None), stop="never")
    base, value = x, -torch.log_softmax(net(x), dim=1).gather(1, y[:, None])[:, 0]
    rows = predict(net, x) == y
    for asked in recorder.asked[2:]:
        if len(asked) < rows.sum():
            break  # one has fallen and left
        change = (asked - base[rows]).flatten(1)
        assert torch.allclose(change.norm(dim=1), torch.full_like(change[:, 0], 0.1), atol=1e-9)
        assert ((change.abs() > 1e-12).sum(dim=1) == 1).all()
        new = -torch.log_softmax(net(asked), dim=1).gather(1, y[rows, None])[:, 0]
        better = new > value[rows]
        base, value = base.clone(), value.clone()
        base[rows] = torch.where(better[:, None, None, None], asked, base[rows])
        value[rows] = torch.where(better, new, value[rows])


@pytest.mark.parametrize("basis", [Pixels(), DCT(0.5)])
@pytest.mark.parametrize("threat", [Lp("linf", 0.2), Lp("l2", 1.0), Lp("l2", None)])
def test_it_finds_examples_inside_and_equals_its_samples_one_by_one(basis, threat, net, images):
    y = predict(net, images)
    attack = SimBA(basis=basis, queries=300)
    result = attack(net, images, y, threat)
    assert result.success.sum() >= 4
    assert threat.contains(result.x_adv, images).all()
    for i in (1, 8):
        alone = attack(net, images[i : i + 1], y[i : i + 1], threat, indices=torch.tensor([i]))
        assert torch.allclose(alone.x_adv[0], result.x_adv[i], atol=1e-12)
        assert alone.forwards[0] == result.forwards[i]


def test_in_linf_a_linear_model_falls_wherever_it_can():
    """Passing over the pixels again fills the ball: success just beyond the exact distance, none within."""
    model, w = linear(bias=0.5)
    x = torch.full((4, 1, 4, 4), 0.5, dtype=torch.float64)
    y = torch.zeros(4, dtype=torch.int64)
    distance = 0.5 / w.abs().sum().item()
    wide, narrow = (SimBA(step=0.005, queries=400)(model, x, y, Lp("linf", distance * k)) for k in (1.05, 0.999))
    assert wide.success.all()
    assert not narrow.success.any()


def test_without_a_budget_the_first_success_ends_the_search(net, images):
    result = SimBA(queries=500)(net, images, predict(net, images), Lp("l2", None))
    assert result.success.any()
    assert torch.equal(result.forwards[result.success], result.first_success[result.success])


def test_targets(net, images):
    goal = Targeted((predict(net, images) + 1) % 4)
    result = SimBA(queries=1000)(net, images, goal, Lp("l2", None))
    assert result.success.sum() >= 6
    assert torch.equal(predict(net, result.x_adv) == goal.labels, result.success)


def test_hyper_parameters_are_checked():
    for options, message in [
        ({"step": 0}, "step must be > 0"),
        ({"queries": 1}, "queries must be a whole number"),
        ({"basis": "dct"}, "basis must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            SimBA(**options)
    assert not SimBA().supports(Lp("linf", None)) and not SimBA().supports(Lp("l1", 1))
