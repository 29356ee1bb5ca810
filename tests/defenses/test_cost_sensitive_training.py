from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from robustbench_lite.certify import IBP, CostSensitive, bounds, cost_report, seed_class_costs, small_large_costs
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.defenses.base import Batch
from robustbench_lite.defenses.cost_sensitive_training import CostSensitiveTraining
from robustbench_lite.defenses.ibp_training import IBPTraining
from tests.defenses.certified_cases import (
    CLASSES,
    batch,
    convolutional,
    killed_and_resumed,
    linear,
    loss_at,
    trained_on_digits,
)

COSTS = ((0.0, 2.0, 0.0, 0.5), (0.0, 0.0, 0.0, 0.0), (1.0, 1.0, 0.0, 1.0), (0.0, 0.0, 0.1, 0.0))


@pytest.mark.parametrize("costs", [COSTS, seed_class_costs(2, CLASSES), small_large_costs(CLASSES)])
def test_the_loss_is_the_papers(costs: tuple[tuple[float, ...], ...]) -> None:
    model, b, eps, alpha = convolutional(), batch(11), 0.2, 0.7
    loss = loss_at(CostSensitiveTraining(eps, cost_matrix=costs, alpha=alpha), model, b)
    expected = float(torch.nn.functional.cross_entropy(model(b.x), b.y).detach())
    low, high = (b.x - eps).clamp(0, 1), (b.x + eps).clamp(0, 1)
    for k in range(CLASSES):
        if any(costs[k]):
            terms = []
            for i in (b.y == k).nonzero().flatten().tolist():
                total = 1.0
                for j in range(CLASSES):
                    row = torch.zeros(1, CLASSES)
                    row[0, j] += 1
                    row[0, k] -= 1
                    f = float(bounds(model, (low[i : i + 1], high[i : i + 1]), "ibp", row)[1].detach())
                    total += costs[k][j] * math.exp(f)
                terms.append(math.log(total))
            expected += alpha * sum(terms) / len(terms)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_a_linear_net_has_the_closed_form() -> None:
    model, b, eps = linear(2), batch(classes=2), 0.2
    weight, bias = (p.detach().double() for p in model.parameters())
    w, shift = weight[1] - weight[0], bias[1] - bias[0]
    first = (b.y == 0).nonzero().flatten().tolist()
    terms = []
    for i in first:
        x = b.x[i].flatten().double()
        worst = torch.where(w > 0, (x + eps).clamp_max(1), (x - eps).clamp_min(0)) @ w + shift
        terms.append(float((1 + 3 * worst.exp()).log()))
    clean = float(torch.nn.functional.cross_entropy(model(b.x), b.y).detach())
    loss = loss_at(CostSensitiveTraining(eps, cost_matrix=[[0, 3], [0, 0]], alpha=2.0), model, b)
    assert float(loss.detach()) == pytest.approx(clean + 2 * sum(terms) / len(terms), rel=1e-5)


def test_a_batch_without_seed_classes_has_the_clean_loss() -> None:
    model, b = convolutional(), batch()
    others = Batch(b.x, torch.ones_like(b.y), b.indices)
    clean = torch.nn.functional.cross_entropy(model(b.x), others.y)
    assert torch.equal(loss_at(CostSensitiveTraining(0.2, cost_matrix=COSTS), model, others), clean)


def test_what_costs_nothing_gets_a_finite_gradient_that_ignores_it() -> None:
    model, b = convolutional(), batch()
    loss_at(CostSensitiveTraining(0.2, cost_matrix=COSTS), model, b).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_it_leaves_fewer_protected_pairs_open_than_uniform_training_and_more_others() -> None:
    held_out, eps, costs = load_data("digits", "test"), 0.1, seed_class_costs(9)
    settings: dict[str, Any] = {"warmup": 0.1, "ramp": 0.4}
    uniform = trained_on_digits(IBPTraining(eps, **settings), epochs=30)
    mine = trained_on_digits(CostSensitiveTraining(eps, cost_matrix=costs, alpha=0.1, **settings), epochs=30)

    def figures(model: torch.nn.Module) -> tuple[float, float, float]:
        found = CostSensitive(IBP(), costs)(model, held_out.images, held_out.labels, Lp("linf", eps))
        assert found.margins is not None
        report = cost_report(found.margins, held_out.labels, costs)
        clean = float((model(held_out.images).argmax(dim=1) == held_out.labels).float().mean())
        return report.violated, float(report.unprotected.nanmean()), clean

    (theirs, theirs_open, theirs_clean), (violated, unprotected, clean) = figures(uniform), figures(mine)
    assert clean >= theirs_clean - 0.02
    assert violated <= 0.7 * theirs
    assert unprotected > 2 * theirs_open


def test_the_matrix_must_fit_the_classes() -> None:
    objective = CostSensitiveTraining(0.1, cost_matrix=seed_class_costs(1, 3))
    with pytest.raises(ValueError, match="about 3 classes, but the data have 10"):
        trained_on_digits(objective, epochs=1)


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = CostSensitiveTraining(0.1, cost_matrix=COSTS, warmup=0.1, ramp=0.4)
    assert killed_and_resumed(objective, tmp_path / "run.pt", monkeypatch)


def test_a_tensor_of_costs_is_kept_as_numbers() -> None:
    objective = CostSensitiveTraining(0.1, cost_matrix=torch.tensor(seed_class_costs(1, 3)))
    assert objective == replace(objective, cost_matrix=seed_class_costs(1, 3))
    assert "tensor" not in repr(objective)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("must be square", lambda: CostSensitiveTraining(0.1)),
        ("0 on its diagonal", lambda: CostSensitiveTraining(0.1, cost_matrix=[[1, 0], [0, 0]])),
        ("entries >= 0", lambda: CostSensitiveTraining(0.1, cost_matrix=[[0, -1], [0, 0]])),
        ("nothing to protect", lambda: CostSensitiveTraining(0.1, cost_matrix=[[0, 0], [0, 0]])),
        ("a number > 0", lambda: CostSensitiveTraining(0.1, cost_matrix=COSTS, alpha=0)),
        ("a number > 0", lambda: CostSensitiveTraining(0.1, cost_matrix=COSTS, alpha="0.5")),
        ("a number > 0", lambda: CostSensitiveTraining(0.1, cost_matrix=COSTS, alpha=float("inf"))),
        ("eps must be > 0", lambda: CostSensitiveTraining(0, cost_matrix=COSTS)),
    ],
)
def test_bad_arguments_are_refused(message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        make()
