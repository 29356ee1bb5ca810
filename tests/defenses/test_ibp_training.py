from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from robustbench_lite.core.rng import Streams
from robustbench_lite.data import load_data
from robustbench_lite.data.base import Dataset
from robustbench_lite.defenses.base import Batch, Step
from robustbench_lite.defenses.certified_training import margins_specification, worst_case_cross_entropy
from robustbench_lite.defenses.ibp_training import IBPTraining
from robustbench_lite.defenses.standard import StandardTraining
from robustbench_lite.training import train

SIZE, HIDDEN, CLASSES = 9, 5, 4


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(SIZE, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


def batch(n: int = 6) -> Batch:
    x = torch.rand(n, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.arange(n) % CLASSES, torch.arange(n))


def streams() -> Streams:
    return Streams.from_generator(None, batch().indices)


def upper_margins(model: nn.Module, x: np.ndarray, y: int, eps: float) -> np.ndarray:
    """Upper bounds of z_j - z_y, j != y, from one sample's pixels by loops over neurons, sharing nothing."""
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in model.parameters())
    low, high = np.maximum(x - eps, 0), np.minimum(x + eps, 1)
    hidden = []
    for row, bias in zip(w1, b1, strict=True):
        least = bias + sum(w * (low[i] if w > 0 else high[i]) for i, w in enumerate(row))
        most = bias + sum(w * (high[i] if w > 0 else low[i]) for i, w in enumerate(row))
        hidden.append((max(least, 0), max(most, 0)))
    margins = []
    for j in range(CLASSES):
        if j != y:
            row, bias = w2[j] - w2[y], b2[j] - b2[y]
            margins.append(bias + sum(w * (hidden[i][1] if w > 0 else hidden[i][0]) for i, w in enumerate(row)))
    return np.array(margins)


def cross_entropy(logits: np.ndarray, y: int) -> float:
    return float(np.log(np.exp(logits).sum()) - logits[y])


@pytest.mark.parametrize(("index", "share"), [(0, 0.0), (19, 0.0), (40, 0.5), (60, 1.0), (99, 1.0)])
@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_the_loss_is_the_papers(index: int, share: float, kappa: float) -> None:
    model, b, eps = tiny(), batch(), 0.3
    objective = IBPTraining(eps, kappa=kappa, warmup=0.2, ramp=0.4)
    loss = objective.loss(model, b, Step(index, 100, 0), None, streams())
    now = 1 - share * (1 - kappa)
    expected, twice = [], []
    for x, y in zip(b.x.flatten(1).double().numpy(), b.y.tolist(), strict=True):
        logits = model(torch.from_numpy(x).float().view(1, 1, 3, 3)).detach().double().numpy()[0]
        v = upper_margins(model, x, y, share * eps)
        clean = cross_entropy(logits, y)
        expected.append(now * clean + (1 - now) * cross_entropy(np.append(v, 0), CLASSES - 1))
        twice.append(now * clean + (1 - now) * cross_entropy(np.append(v, [0, 0]), CLASSES - 1))
    assert float(loss.detach()) == pytest.approx(np.mean(expected), rel=1e-5)
    if share > 0:  # a second zero would be another loss, and the test would notice
        assert float(loss.detach()) != pytest.approx(np.mean(twice), rel=1e-2)


def test_without_a_ball_the_worst_case_is_the_clean_loss() -> None:
    model, b = tiny(), batch()
    logits = model(b.x)
    specification = margins_specification(b.y, CLASSES)
    upper = torch.einsum("bjk,bk->bj", specification, logits)
    torch.testing.assert_close(worst_case_cross_entropy(upper), nn.functional.cross_entropy(logits, b.y))


def test_the_specification_names_the_wrong_classes_in_order() -> None:
    y = torch.tensor([0, 2, 3])
    rows = margins_specification(y, 4)
    assert rows.shape == (3, 3, 4)
    for row, label in zip(rows, y.tolist(), strict=True):
        wrong = [j for j in range(4) if j != label]
        z = torch.randn(4)
        torch.testing.assert_close(row @ z, z[wrong] - z[label])


@torch.no_grad()
def test_the_bounds_are_cut_by_the_images_range() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    model[1].weight.copy_(torch.tensor([[0.0], [1.0]]))
    x = torch.full((1, 1, 1, 1), 0.9)
    specification = margins_specification(torch.tensor([0]), 2)
    assert float(upper(IBPTraining(0.3), model, x, 1.0, specification)) == pytest.approx(1.0)
    assert float(upper(IBPTraining(0.3, bounds=(0.0, 5.0)), model, x, 1.0, specification)) == pytest.approx(1.2)


def test_batch_norm_enters_with_its_running_statistics_and_the_clean_pass_moves_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, CLASSES)
    ).train()
    objective = IBPTraining(0.1, warmup=0, ramp=0)
    loss = objective.loss(model, batch(), Step(50, 100, 0), None, streams())
    assert loss.isfinite()
    assert model[1].num_batches_tracked == 1
    assert model[1].training


def upper(objective: IBPTraining, model: nn.Module, x: torch.Tensor, share: float, C: torch.Tensor) -> torch.Tensor:
    return objective.upper(model, objective.ball(x, share), C, share)


def certified(model: nn.Module, data: Dataset, eps: float) -> float:
    with torch.no_grad():
        specification = margins_specification(data.labels, data.num_classes)
        worst = upper(IBPTraining(eps), model, data.images, 1.0, specification).max(dim=1).values
    return float((worst < 0).float().mean())


def test_it_certifies_what_standard_training_does_not() -> None:
    data, held_out, eps = load_data("digits", "train"), load_data("digits", "test"), 0.1

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    settings: dict[str, Any] = {"epochs": 25, "batch_size": 100, "learning_rate": 5e-3}
    assert certified(train(net(), data, StandardTraining(), **settings), held_out, eps) < 0.1
    assert certified(train(net(), data, IBPTraining(eps, warmup=0.1, ramp=0.5), **settings), held_out, eps) > 0.5


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("eps must be > 0", lambda: IBPTraining(0.0)),
        ("expected a number or a fraction", lambda: IBPTraining("eight")),
        ("kappa is the share", lambda: IBPTraining(0.1, kappa=1.5)),
        ("together <= 1", lambda: IBPTraining(0.1, warmup=2000, ramp=10_000)),
        ("together <= 1", lambda: IBPTraining(0.1, warmup=float("nan"))),
        ("for pixel units write '8/255'", lambda: IBPTraining(8)),
        ("finite number", lambda: IBPTraining(float("nan"))),
        ("low < high", lambda: IBPTraining(0.1, bounds=(1, 0))),
    ],
)
def test_bad_arguments_are_refused(message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_images_that_rounding_carried_out_of_their_range_have_a_box() -> None:
    x, specification = torch.full((1, 1, 3, 3), 1 + 5e-7), margins_specification(torch.tensor([0]), CLASSES)
    assert upper(IBPTraining(0.1), tiny(), x, 1e-7, specification).isfinite().all()


def test_eps_may_be_a_fraction() -> None:
    x = torch.full((1, 1, 3, 3), 0.5)
    specification = margins_specification(torch.tensor([0]), CLASSES)
    model = tiny()
    bounds = [upper(IBPTraining(eps), model, x, 1.0, specification) for eps in ("1/10", 0.1)]
    assert torch.equal(*bounds)
