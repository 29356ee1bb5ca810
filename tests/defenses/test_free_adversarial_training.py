from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.defenses.base import Batch
from robustbench_lite.defenses.free_adversarial_training import FreeAdversarialTraining
from tests.defenses.training_cases import (
    EPS,
    LAST,
    batch,
    digits,
    expect_resumable,
    linear,
    robust_accuracy,
    streams,
    trained,
)

RATE = 0.3


class Data:
    """As much of a data set as `setup` looks at."""

    images = torch.zeros(5, 1, 3, 3)


def descent(model: nn.Module) -> Any:
    """Plain gradient descent."""

    def descend(loss: Tensor) -> None:
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad

    return descend


def by_hand(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, eps: float, length: float, replays: int) -> Tensor:
    """The same on a linear net, by the closed forms of both gradients of the cross-entropy."""
    weight, bias = model[1].weight.detach().clone().double(), model[1].bias.detach().clone().double()
    x, delta = x.double().flatten(1), delta.double().flatten(1)
    for _ in range(replays):
        inputs = (x + delta).clamp(0, 1)
        wrong = (inputs @ weight.T + bias).softmax(1) - torch.eye(3, dtype=torch.float64)[y]
        delta = (delta + length * (wrong @ weight).sign()).clamp(-eps, eps)
        weight -= RATE * wrong.T @ inputs / len(x)
        bias -= RATE * wrong.mean(0)
    with torch.no_grad():
        model[1].weight.copy_(weight)
        model[1].bias.copy_(bias)
    return delta.reshape(-1, 1, 3, 3)


@pytest.mark.parametrize("length", [None, 0.03])
def test_one_backward_pass_moves_weights_and_perturbation(length: float | None) -> None:
    ours, theirs, objective = linear(), linear(), FreeAdversarialTraining(0.1, replays=3, step_size=length)
    state, delta = objective.setup(ours, Data()), torch.zeros(8, 1, 3, 3)
    first, second = batch(8), Batch(batch(12).x[8:], torch.tensor([2, 0, 1, 1]), torch.arange(4))
    calls = []
    for b in (second, first, second):  # of sizes 4, 8, 4: the perturbation grows, and then a part of it waits
        descend = descent(ours)
        objective.update(ours, b, LAST, state, streams(b), lambda v, d=descend: (calls.append(1), d(v))[1])
        moved = by_hand(theirs, b.x, b.y, delta[: len(b.x)], 0.1, length or 0.1, 3)
        delta = torch.cat([moved.float(), delta[len(b.x) :]])
        torch.testing.assert_close(state.delta, delta[: len(state.delta)])
        torch.testing.assert_close(ours[1].weight, theirs[1].weight)
    assert len(calls) == 9


def test_images_stay_in_ball_and_range_and_black_pixels_do_not_hold_the_perturbation() -> None:
    model, objective, seen = linear(), FreeAdversarialTraining(0.2, replays=4), []
    state = objective.setup(model, Data())
    x = torch.zeros(6, 1, 3, 3)
    b = Batch(x, torch.arange(6) % 3, torch.arange(6))
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    state.first(6).fill_(-0.2)
    objective.update(model, b, LAST, state, streams(b), descent(model))
    for images in seen:
        assert images.min() >= 0 and images.max() <= 0.2 + 1e-6
    assert (state.delta > 0).any()
    assert state.delta.abs().max() <= 0.2


def test_the_loss_is_taken_at_the_perturbation_and_returned_without_a_graph() -> None:
    model, objective, b = linear(), FreeAdversarialTraining(0.1, replays=1), batch()
    state = objective.setup(model, Data())
    state.first(8).fill_(0.05)
    loss = objective.loss(model, b, LAST, state, streams(b))
    torch.testing.assert_close(loss, nn.functional.cross_entropy(model(b.x + 0.05), b.y))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    returned = objective.update(model, b, LAST, state, streams(b), descent(model))
    torch.testing.assert_close(returned, loss.detach())
    assert not returned.requires_grad


def test_it_raises_accuracy_under_attack() -> None:
    assert len(digits("train", 400)) % 80 == 0
    assert (
        robust_accuracy(trained(FreeAdversarialTraining(EPS), epochs=15, learning_rate=3e-3)) > robust_accuracy() + 0.1
    )


def test_a_killed_training_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_resumable(FreeAdversarialTraining(0.1, replays=2), tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("eps must be > 0", {"eps": 0.0}),
        ("at most the image range", {"eps": 8.0}),
        ("step_size must be > 0", {"eps": 0.1, "step_size": -0.1}),
        ("replays must be", {"eps": 0.1, "replays": 0}),
        ("bounds must be", {"eps": 0.1, "bounds": (1.0, 0.0)}),
    ],
)
def test_bad_arguments_are_refused(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        FreeAdversarialTraining(**options)
