from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.attacks.universal import UniversalPerturbation
from robustbench_lite.core.threats import Lp
from robustbench_lite.defenses.base import Batch
from robustbench_lite.defenses.universal_adversarial_training import UniversalAdversarialTraining
from tests.defenses.training_cases import LAST, batch, digits, expect_resumable, linear, standard, streams, trained


class Data:
    """As much of a data set as `setup` looks at."""

    images = torch.zeros(5, 1, 3, 3)


def backward_only(loss: Tensor) -> None:
    loss.backward()


def update(objective: UniversalAdversarialTraining, model: nn.Module, b: Batch, state: dict[str, Tensor]) -> Tensor:
    return objective.update(model, b, LAST, state, streams(b), backward_only)


def slope_by_hand(model: nn.Module, x: Tensor, y: Tensor, beta: float) -> Tensor:
    """The gradient of sum min(CE, beta) on a linear net: sum of W^T (p - e_y) where CE < beta."""
    with torch.no_grad():
        z = model(x)
        keep = F.cross_entropy(z, y, reduction="none") < beta
        return ((z.softmax(1) - torch.eye(3)[y]) @ model[1].weight)[keep].sum(0).reshape(1, 3, 3)


def test_one_backward_pass_moves_the_perturbation_along_the_clipped_loss() -> None:
    model, b, beta = linear(), batch(), 1.2
    losses = F.cross_entropy(model(b.x), b.y, reduction="none")
    assert 1 < int((losses < beta).sum()) < 8  # the clip has something to say
    objective = UniversalAdversarialTraining(0.1, step_size=0.04, beta=beta)
    state, delta = objective.setup(model, Data()), torch.zeros(1, 3, 3)
    assert torch.equal(state["delta"], delta)
    for _ in range(4):  # the third step meets the edge of the ball
        model.zero_grad()
        expected = F.cross_entropy(model(b.x + delta), b.y)
        delta = (delta + 0.04 * slope_by_hand(model, b.x + delta, b.y, beta).sign()).clamp(-0.1, 0.1)
        returned = update(objective, model, b, state)
        torch.testing.assert_close(state["delta"], delta)
        torch.testing.assert_close(returned, expected.detach())
        (slope,) = torch.autograd.grad(expected, model[1].weight)  # the weights learn from the whole loss
        torch.testing.assert_close(model[1].weight.grad, slope)
    assert float(delta.abs().max()) == pytest.approx(0.1)


def test_images_stay_in_range_and_those_that_were_cut_ask_for_no_step_further_out() -> None:
    model = linear()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-1.0], [1.0], [1.0]]).expand(3, 9))  # the sign of the slope is known
    x = torch.zeros(9, 1, 3, 3)
    x[8] = 0.5
    b = Batch(x, torch.tensor([1] * 8 + [0]), torch.arange(9))
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    objective = UniversalAdversarialTraining(0.2, step_size=0.05)
    state = objective.setup(model, Data())
    state["delta"].fill_(-0.1)
    update(objective, model, b, state)
    # eight black images ask to go darker, which they cannot; the grey one alone is heard, and asks to go brighter
    torch.testing.assert_close(state["delta"], torch.full((1, 3, 3), -0.05))
    assert seen[0].min() == 0


def test_the_loss_is_taken_at_the_perturbation() -> None:
    model, b, objective = linear(), batch(), UniversalAdversarialTraining(0.1)
    loss = objective.loss(model, b, LAST, {"delta": torch.full((1, 3, 3), 0.05)}, streams(b))
    torch.testing.assert_close(loss, F.cross_entropy(model(b.x + 0.05), b.y))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_it_withstands_a_fresh_universal_perturbation() -> None:
    threat, data, held_out = Lp("linf", 0.2), digits("train", 400), digits("test", 150)

    def accuracy(model: nn.Module) -> float:
        attack = UniversalPerturbation(epochs=10).fit(model, data.images, data.labels, threat)
        return 1 - float(attack(model, held_out.images, held_out.labels, threat).success.float().mean())

    objective = UniversalAdversarialTraining(0.2)
    assert accuracy(trained(objective, epochs=60, learning_rate=2e-3)) > accuracy(standard()) + 0.1


def test_a_killed_training_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_resumable(UniversalAdversarialTraining(0.1), tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("eps must be > 0", {"eps": 0.0}),
        ("at most the image range", {"eps": 8.0}),
        ("step_size must be > 0", {"eps": 0.1, "step_size": 0.0}),
        ("beta must be > 0", {"eps": 0.1, "beta": 0.0}),
    ],
)
def test_bad_arguments_are_refused(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        UniversalAdversarialTraining(**options)
