"""What the tests of objectives share: a linear model, small trainings on digits, and a training that is killed."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.attacks.pgd import PGD
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.data.base import Dataset
from robustbench_lite.defenses.base import Batch, Objective, Step
from robustbench_lite.defenses.standard import StandardTraining
from robustbench_lite.training import train

__all__ = [
    "EPS", "LAST", "batch", "digits", "expect_one_pass", "expect_resumable", "linear", "normalised", "robust_accuracy",
    "standard", "streams", "trained", "weak_and_strong",
]  # fmt: skip

EPS = 0.12
LAST = Step(999, 1000, 9)


def linear(seed: int = 0, classes: int = 3) -> nn.Module:
    """A linear classifier of images (1, 3, 3)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(9, classes))


def normalised() -> nn.Module:
    """A convolutional classifier of images (1, 3, 3) with BatchNorm, in train mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 6, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))


def expect_one_pass(objective: Objective) -> None:
    """Examples are made in eval mode; clean and adversarial images are learnt from together, in train mode."""
    model, b = normalised(), batch()
    seen: list[tuple[bool, int]] = []
    model[1].register_forward_hook(lambda part, inputs, _: seen.append((part.training, len(inputs[0]))))
    objective.loss(model, b, LAST, None, streams(b)).backward()
    assert [size for training, size in seen if training] == [16]
    assert model[1].num_batches_tracked == 1
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def batch(n: int = 8, classes: int = 3) -> Batch:
    """Images (n, 1, 3, 3) well inside [0, 1]."""
    x = 0.3 + 0.4 * torch.rand(n, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.arange(n) % classes, torch.arange(n) + 100)


def streams(samples: Batch, seed: int = 0) -> Streams:
    return Streams.from_generator(torch.Generator().manual_seed(seed), samples.indices)


@cache
def digits(split: str, count: int) -> Dataset:
    return load_data("digits", split).head(count)


def trained(objective: Objective, **settings: Any) -> nn.Module:
    """A small net, trained by the objective on 400 digits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    usual: dict[str, Any] = {"epochs": 15, "batch_size": 80, "learning_rate": 1e-2}
    return train(net, digits("train", 400), objective, **(usual | settings))


@cache
def standard() -> nn.Module:
    return trained(StandardTraining())


def robust_accuracy(model: nn.Module | None = None, eps: float = EPS) -> float:
    """The share of held-out digits that PGD on the margin leaves right; of the standard net if none is given."""
    data = digits("test", 150)
    model = standard() if model is None else model
    broken = PGD(steps=20, loss="margin")(model, data.images, data.labels, Lp("linf", eps)).success
    return 1 - float(broken.float().mean())


def weak_and_strong(model: nn.Module | None = None, eps: float = EPS) -> tuple[float, float]:
    """What a baseline PGD of 40 small steps on the cross-entropy leaves right, and PGD on the margin with restarts."""
    model = standard() if model is None else model
    data, threat = digits("test", 150), Lp("linf", eps)
    attacks = PGD(steps=40, step_size=eps / 30), PGD(steps=40, restarts=3, loss="margin")
    broken = [attack(model, data.images, data.labels, threat).success.float().mean() for attack in attacks]
    return 1 - float(broken[0]), 1 - float(broken[1])


class KilledError(Exception):
    """Stands for the end of the process."""


def noisy_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(16, 3)]
        return nn.Sequential(*parts)


def expect_resumable(objective: Objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill a training at steps of each of its epochs, go on, and compare with a whole one to the bit."""
    x = torch.rand(42, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    data = Dataset("noise", "train", x, torch.arange(42) % 3, torch.arange(42), 3)

    def run(checkpoint: Path | None = None) -> dict[str, Tensor]:
        settings: dict[str, Any] = {"epochs": 3, "batch_size": 12, "learning_rate": 0.02, "device": "cpu"}
        return train(noisy_net(), data, objective, checkpoint=checkpoint, **settings).state_dict()

    whole = run()
    original = type(objective).update
    for at in (5, 10):  # four steps an epoch: in the second and the third

        def update(self: Any, model: Any, batch: Any, step: Step, *rest: Any, at: int = at, **named: Any) -> Tensor:
            if step.index == at:
                raise KilledError
            return original(self, model, batch, step, *rest, **named)

        path = tmp_path / f"{at}.pt"
        with monkeypatch.context() as patch:
            patch.setattr(type(objective), "update", update)
            with pytest.raises(KilledError):
                run(path)
        assert path.exists()
        resumed = run(path)
        assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
