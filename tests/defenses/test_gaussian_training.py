"""Gaussian, SmoothAdv and consistency training: losses in closed form, streams, and runs that are killed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp
from robustbench_lite.data.base import Dataset
from robustbench_lite.defenses import (
    ConsistencyTraining,
    GaussianAugmentation,
    Objective,
    PixelDPTraining,
    SmoothAdvTraining,
    consistency,
)
from robustbench_lite.defenses.base import Batch, Step
from robustbench_lite.training import train

OBJECTIVES = [
    GaussianAugmentation(0.3),
    SmoothAdvTraining(0.3, 0.5, steps=2, samples=2, ramp=0.5),
    ConsistencyTraining(0.3),
    PixelDPTraining(0.3, layer="0"),
    PixelDPTraining(0.3, noise="laplace"),
]


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def linear() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def data(n: int = 50) -> Dataset:
    x = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return Dataset("noise", "train", x, torch.arange(n) % 3, torch.arange(n), 3)


def batch(n: int = 8) -> Batch:
    samples = data(n)
    return Batch(samples.images, samples.labels, samples.indices + 100)


def streams(seed: int = 0, n: int = 8) -> Streams:
    return Streams.from_generator(torch.Generator().manual_seed(seed), torch.arange(n) + 100)


def loss(objective: Objective, model: nn.Module, progress: float = 0.9, seed: int = 0) -> Tensor:
    return objective.loss(model, batch(), Step(round(100 * progress), 100, 0), None, streams(seed))


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_a_killed_training_resumes_to_the_same_bits(
    objective: Objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 15, "learning_rate": 0.02, "device": "cpu"}
    whole = train(net(), data(), objective, **settings).state_dict()
    original = type(objective).loss

    def dying(self: Any, model: nn.Module, part: Batch, step: Step, *rest: Any) -> Tensor:
        if step.index == 6:
            raise KilledError
        return original(self, model, part, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(type(objective), "loss", dying)
        with pytest.raises(KilledError):
            train(net(), data(), objective, checkpoint=tmp_path / "run.pt", **settings)
    again = train(net(), data(), objective, checkpoint=tmp_path / "run.pt", **settings).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in whole.items())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_what_a_sample_meets_depends_on_its_own_stream(objective: Objective) -> None:
    """The mean loss of a batch is the mean of its samples' losses: no BatchNorm here, and draws of their own."""
    if isinstance(objective, PixelDPTraining):
        objective = replace(objective, layer="1" if objective.layer else None)
    model, whole = linear(), batch()
    alone = []
    for row in range(8):
        part = Batch(whole.x[row : row + 1], whole.y[row : row + 1], whole.indices[row : row + 1])
        own = streams().take(torch.tensor([row]))
        alone.append(objective.loss(model, part, Step(90, 100, 0), None, own))
    torch.testing.assert_close(loss(objective, model), torch.stack(alone).mean())
    assert not torch.equal(loss(objective, model), loss(objective, model, seed=1))


def test_gaussian_augmentation_is_the_cross_entropy_at_one_noisy_copy() -> None:
    noise = streams().normal(1, 4, 4)
    expected = F.cross_entropy(linear()(batch().x + 0.3 * noise), batch().y)
    torch.testing.assert_close(loss(GaussianAugmentation(0.3), linear()), expected)


def test_consistency_training_is_the_papers_loss() -> None:
    model, objective = linear(), ConsistencyTraining(0.3, weight=7.0, entropy=0.5, samples=3)
    noise = streams().normal(3, 1, 4, 4)
    total = 0.0
    for x, y, draws in zip(batch().x, batch().y, noise, strict=True):
        logits = model(x + 0.3 * draws).double()
        q = logits.softmax(dim=1).detach()
        mean = q.mean(dim=0)
        kl = sum(float((mean * (mean / row).log()).sum()) for row in q) / 3
        entropy = -float((mean * mean.log()).sum())
        total += float(F.cross_entropy(logits, y.repeat(3)).detach()) + 7 * kl + 0.5 * entropy
    assert float(loss(objective, model).detach()) == pytest.approx(total / 8, rel=1e-5)


def test_consistency_is_zero_for_equal_answers_and_survives_probabilities_of_zero() -> None:
    same = torch.tensor([[[1.0, 2.0, -1.0]] * 4])
    apart, unsure = consistency(same)
    p = same[0, 0].softmax(dim=0)
    assert float(apart) == pytest.approx(0, abs=1e-6)
    assert float(unsure) == pytest.approx(-float((p * p.log()).sum()))
    far = torch.tensor([[[0.0, 300.0], [300.0, 0.0]]], requires_grad=True)
    apart, unsure = consistency(far)
    assert float(unsure.detach()) == pytest.approx(math.log(2))
    (apart + unsure).sum().backward()
    assert far.grad is not None
    assert far.grad.isfinite().all()


def soft_loss(model: nn.Module, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    each = torch.stack([model(x + noise[:, i]).softmax(dim=1) for i in range(noise.shape[1])])
    return F.nll_loss(each.mean(dim=0).log(), y, reduction="none")


def test_smooth_adv_examples_lie_in_the_ball_and_raise_the_soft_loss_of_their_draws() -> None:
    objective, model, b = SmoothAdvTraining(0.3, 0.5, steps=8, samples=4), linear(), batch()
    noise = 0.3 * streams().normal(4, 1, 4, 4)
    found = objective.examples(model, b, noise, 0.5)
    assert Lp("l2", 0.5).contains(found, b.x).all()
    assert not found.requires_grad
    assert (soft_loss(model, found, b.y, noise) > soft_loss(model, b.x, b.y, noise)).all()


def test_one_step_of_smooth_adv_follows_the_gradient_of_the_soft_loss() -> None:
    objective, model = SmoothAdvTraining(0.3, 0.01, steps=1, samples=3), linear()
    b = replace(batch(), x=batch().x / 2 + 0.25)  # far from the walls
    noise = 0.3 * streams().normal(3, 1, 4, 4)
    leaf = b.x.clone().requires_grad_()
    slope = torch.autograd.grad(soft_loss(model, leaf, b.y, noise).sum(), leaf)[0]
    unit = slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    moved = objective.examples(model, b, noise, 0.01) - b.x  # a step of 2 eps, cut to eps
    torch.testing.assert_close(moved, 0.01 * unit, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(("progress", "eps"), [(0.0, 0.0), (0.1, 0.1), (0.5, 0.5), (0.9, 0.5)])
def test_the_eps_of_smooth_adv_rises_and_the_net_learns_from_all_draws(
    progress: float, eps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def examples(self: Any, model: nn.Module, part: Batch, noise: Tensor, size: float) -> Tensor:
        seen.append(size)
        return part.x + 1

    monkeypatch.setattr(SmoothAdvTraining, "examples", examples)
    found = loss(SmoothAdvTraining(0.3, 0.5, samples=2, ramp=0.5), linear(), progress)
    assert seen == ([] if eps == 0 else [pytest.approx(eps)])
    noise, x = streams().normal(2, 1, 4, 4), batch().x + (eps > 0)
    each = [F.cross_entropy(linear()(x + 0.3 * noise[:, i]), batch().y) for i in range(2)]
    torch.testing.assert_close(found, torch.stack(each).mean())


def test_smooth_adv_meets_the_net_in_eval_mode_and_learns_in_train_mode() -> None:
    model, modes = net().train(), []
    model[1].register_forward_hook(lambda part, *_: modes.append(part.training))
    loss(SmoothAdvTraining(0.3, 0.5, steps=3, samples=2), model)
    assert modes == [False, False, False, True]
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("sigma", lambda: GaussianAugmentation(0)),
        ("sigma", lambda: SmoothAdvTraining(-1, 0.5)),
        ("eps must be > 0", lambda: SmoothAdvTraining(0.5, 0)),
        ("steps", lambda: SmoothAdvTraining(0.5, 0.5, steps=0)),
        ("samples", lambda: SmoothAdvTraining(0.5, 0.5, samples=0)),
        ("together <= 1", lambda: SmoothAdvTraining(0.5, 0.5, ramp=1.5)),
        ("samples", lambda: ConsistencyTraining(0.5, samples=1)),
        ("weight", lambda: ConsistencyTraining(0.5, weight=-1)),
        ("entropy", lambda: ConsistencyTraining(0.5, entropy=math.nan)),
    ],
)
def test_bad_arguments_are_refused(message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        make()
