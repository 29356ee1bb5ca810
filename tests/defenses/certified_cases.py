"""What the tests of certified training share: small nets and batches, digits, proven shares, a killed run."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.core.rng import Streams
from robustbench_lite.data import load_data
from robustbench_lite.data.base import Dataset
from robustbench_lite.defenses.base import Batch, Objective, Step
from robustbench_lite.defenses.standard import StandardTraining
from robustbench_lite.training import train

CLASSES = 4


def tiny(classes: int = CLASSES) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, classes))


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    parts = [nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, CLASSES)]
    net = nn.Sequential(*parts)
    with torch.no_grad():  # larger than they come: logits that differ, and bounds that are loose
        for parameter in net.parameters():
            parameter.mul_(3)
    return net


def linear(classes: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, classes))


def batch(n: int = 6, classes: int = CLASSES) -> Batch:
    x = torch.rand(n, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.arange(n) % classes, torch.arange(n))


def streams(n: int = 6) -> Streams:
    return Streams.from_generator(None, torch.arange(n))


def loss_at(objective: Objective, model: nn.Module, b: Batch, progress: float = 0.99) -> Tensor:
    return objective.loss(model, b, Step(round(100 * progress), 100, 0), None, streams(len(b.x)))


def worst_linear_loss(model: nn.Module, b: Batch, eps: float) -> float:
    """The mean of log(1 + sum_j exp(max over the cut ball of z_j - z_y)) of a linear net, pixel by pixel."""
    weight, bias = (p.detach().double() for p in model.parameters())
    total = 0.0
    for image, y in zip(b.x.flatten(1).double(), b.y.tolist(), strict=True):
        terms = 1.0
        for j in range(len(weight)):
            if j != y:
                margin = float(bias[j] - bias[y])
                for w, pixel in zip((weight[j] - weight[y]).tolist(), image.tolist(), strict=True):
                    margin += w * (min(pixel + eps, 1) if w > 0 else max(pixel - eps, 0))
                terms += float(torch.tensor(margin, dtype=torch.float64).exp())
        total += float(torch.tensor(terms).log())
    return total / len(b.x)


def digits_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def trained_on_digits(objective: Objective, **settings: Any) -> nn.Module:
    chosen: dict[str, Any] = {"epochs": 20, "batch_size": 100, "learning_rate": 5e-3} | settings
    return train(digits_net(), load_data("digits", "train"), objective, **chosen)


@cache
def standard_on_digits() -> nn.Module:
    return trained_on_digits(StandardTraining())


def killed_and_resumed(objective: Objective, path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Say whether a run that dies in its second epoch ends, resumed, in the bits of one that does not."""

    class KilledError(Exception):
        pass

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, CLASSES))

    def data() -> Dataset:
        b = batch(30)
        return Dataset("noise", "train", b.x, b.y, b.indices, CLASSES)

    settings: dict[str, Any] = {"epochs": 3, "batch_size": 8, "learning_rate": 0.02}
    whole = train(net(), data(), objective, **settings).state_dict()
    original = type(objective).update

    def update(self: Objective, model: nn.Module, b: Batch, step: Step, *rest: Any) -> Tensor:
        if step.index == 6:
            raise KilledError
        return original(self, model, b, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(type(objective), "update", update)
        with pytest.raises(KilledError):
            train(net(), data(), objective, checkpoint=path, **settings)
    assert path.exists()
    resumed = train(net(), data(), objective, checkpoint=path, **settings).state_dict()
    return all(torch.equal(value, resumed[name]) for name, value in whole.items())
