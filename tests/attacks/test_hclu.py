from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from robustbench_lite.attacks.hclu import HighConfidenceLowUncertainty
from robustbench_lite.core.errors import NotApplicableError
from robustbench_lite.core.goals import Targeted
from robustbench_lite.core.models import predict
from robustbench_lite.core.threats import Lp
from robustbench_lite.defenses._gaussian_process import condition, posterior
from tests.defenses.contract_cases import blobs, fitted

ATTACK = HighConfidenceLowUncertainty(targets=2)
SCALES = torch.tensor([0.5, 0.3, 0.01], dtype=torch.float64).log()


class Process(nn.Module):
    """A Gaussian process on four pixels, in three classes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        places = torch.tensor([[0.2, 0.3, 0.2, 0.7], [0.8, 0.3, 0.4, 0.6], [0.4, 0.8, 0.6, 0.3]], dtype=torch.float64)
        labels = torch.arange(60) % 3
        self.points = (places[labels] + 0.08 * torch.randn(60, 4, dtype=torch.float64, generator=generator)).clamp(0, 1)
        targets = 2 * nn.functional.one_hot(labels, 3).double() - 1
        self.labels, self.given = labels, condition(self.points, targets, SCALES)

    def mean_and_variance(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return posterior(x.flatten(1), self.points, *self.given, SCALES)

    def forward(self, x: Tensor) -> Tensor:
        return self.mean_and_variance(x)[0]


class Plane(nn.Module):
    """Means +-a, with a the first pixel (of 0.5 at the boundary), and a variance that rises with the second."""

    def mean_and_variance(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = 4 * (x[:, 0, 0, 0] - 0.5)
        return torch.stack([a, -a], dim=1), 0.1 + x[:, 0, 0, 1].square() + 0.2 * x[:, 0, 0, 0]

    def forward(self, x: Tensor) -> Tensor:
        return self.mean_and_variance(x)[0]


def slsqp(model: Process, x: Tensor, target: int) -> float:
    """The distance of the input that keeps the constraints, by the solver of the original from the clean input."""
    start = x.flatten().numpy()

    def values(flat: np.ndarray) -> Tensor:
        mean, variance = model.mean_and_variance(torch.as_tensor(flat).reshape(1, 1, 2, 2))
        return torch.stack([mean[0, target] - 0.9, limit - variance[0].log()])

    def slopes(flat: np.ndarray) -> np.ndarray:
        point = torch.as_tensor(flat)
        return torch.autograd.functional.jacobian(values, point).numpy()  # type: ignore[arg-type, no-untyped-call]

    limit = model.mean_and_variance(x[None])[1][0].log()
    found = minimize(
        lambda flat: float(np.square(flat - start).sum()), start, jac=lambda flat: 2 * (flat - start), method="SLSQP",
        bounds=[(0, 1)] * 4, constraints=[{"type": "ineq", "fun": lambda flat: values(flat).numpy(), "jac": slopes}],
    )  # fmt: skip
    kept = bool((values(found.x) > -1e-5).all())
    return float(np.linalg.norm(found.x - start)) if kept else np.inf


def keeps_its_constraints(model: Process, x: Tensor, y: Tensor, found: Tensor, fallen: Tensor) -> None:
    mean, variance = model.mean_and_variance(found)
    best = mean.scatter(1, y[:, None], -torch.inf).amax(dim=1)
    assert (best[fallen] >= 0.9).all()
    assert (variance <= model.mean_and_variance(x)[1])[fallen].all()


def test_it_is_as_near_as_the_solver_of_the_original() -> None:
    model = Process()
    x, y = model.points[:8].reshape(-1, 1, 2, 2) * 0.9 + 0.05, model.labels[:8]
    found = ATTACK(model, x, y, Lp("l2", None))
    nearest = [min(slsqp(model, image, t) for t in range(3) if t != label) for image, label in zip(x, y, strict=True)]
    reachable = torch.tensor(nearest).isfinite()
    assert reachable.sum() >= 6
    assert found.success[reachable].all()
    assert (found.distance <= 1.02 * torch.tensor(nearest) + 1e-3)[reachable].all()
    keeps_its_constraints(model, x, y, found.x_adv, found.success)


def test_the_nearest_point_on_a_plane_by_hand() -> None:
    x, y = torch.tensor([[[[0.9, 0.6]]], [[[0.7, 0.2]]]], dtype=torch.float64), torch.tensor([0, 0])
    found = HighConfidenceLowUncertainty(steps=300)(Plane(), x, y, Lp("l2", None))
    # -a >= 0.9 where the first pixel is 0.275; going there lowers the variance, so the second need not move
    assert found.distance.tolist() == pytest.approx([0.625, 0.425], abs=5e-3)


def test_a_variance_that_must_fall_costs_distance() -> None:
    class Rising(Plane):
        def mean_and_variance(self, x: Tensor) -> tuple[Tensor, Tensor]:
            mean, _ = super().mean_and_variance(x)
            return mean, 2.0 - x[:, 0, 0, 0] + x[:, 0, 0, 1]

    x, y = torch.tensor([[[[0.6, 0.8]]]], dtype=torch.float64), torch.tensor([0])
    threat = Lp("l2", None)
    found = HighConfidenceLowUncertainty(steps=300)(Rising(), x, y, threat)
    assert found.distance.item() == pytest.approx(0.325 * 2**0.5, abs=5e-3)  # both pixels fall alike
    free = HighConfidenceLowUncertainty(steps=300, variance_factor=100.0)(Rising(), x, y, threat)
    assert free.distance.item() == pytest.approx(0.325, abs=5e-3)


@pytest.mark.parametrize("threat", [Lp("linf", 0.5), Lp("l2", 0.7), Lp("l2", None)], ids=str)
def test_each_success_keeps_the_constraints_and_the_threat(threat: Lp) -> None:
    model = Process()
    x, y = model.points[:20].reshape(-1, 1, 2, 2), model.labels[:20]
    clean = predict(model, x) == y
    found = ATTACK(model, x, y, threat)
    assert (found.success & clean).sum() > 8
    keeps_its_constraints(model, x, y, found.x_adv, found.success & clean)
    assert threat.contains(found.x_adv, x).all()
    assert (predict(model, found.x_adv) != y)[found.success].all()


@pytest.mark.parametrize("threat", [Lp("linf", 0.5), Lp("l2", None)], ids=str)
def test_a_batch_is_its_samples(threat: Lp) -> None:
    model, attack = Process(), HighConfidenceLowUncertainty(targets=2, steps=30)
    x, y = model.points[:6].reshape(-1, 1, 2, 2), model.labels[:6]
    whole = attack(model, x, y, threat)
    for number in range(6):
        one = slice(number, number + 1)
        alone = attack(model, x[one], y[one], threat, indices=torch.tensor([number]))
        assert torch.allclose(alone.x_adv, whole.x_adv[one], atol=1e-9)
        assert alone.forwards == whole.forwards[one]


@pytest.mark.parametrize("threat", [Lp("linf", 0.3), Lp("l2", None)], ids=str)
@pytest.mark.parametrize("budget", [1, 2, 3, 10, 50])
def test_budgets_are_kept(budget: int, threat: Lp) -> None:
    model = Process()
    x, y = model.points[:9].reshape(-1, 1, 2, 2), model.labels[:9]
    found = ATTACK(model, x, y, threat, max_queries=budget)
    assert (found.forwards <= budget).all()


def test_a_target_is_the_class_that_is_sure() -> None:
    model = Process()
    x = model.points[:9].reshape(-1, 1, 2, 2)
    target = (model.labels[:9] + 1) % 3
    found = ATTACK(model, x, Targeted(target), Lp("l2", None))
    assert found.success.sum() >= 8  # a search by 240,000 random points finds all nine
    mean = model.mean_and_variance(found.x_adv)[0].gather(1, target[:, None]).squeeze(1)
    assert (mean[found.success] >= 0.9).all()


def test_it_breaks_a_fitted_head() -> None:
    defense, data = fitted("GaussianProcessHead"), blobs(6, "test", 2)
    found = HighConfidenceLowUncertainty(targets=2, steps=100)(defense, data.images, data.labels, Lp("l2", None))
    assert found.success.sum() >= 4
    assert (predict(defense, found.x_adv) >= 0).all()
    assert (predict(defense, found.x_adv) != data.labels)[found.success].all()


def test_what_it_supports_and_needs() -> None:
    wanted = {Lp("l2", None): True, Lp("l2", 1.0): True, Lp("linf", 0.1): True, Lp("linf", None): False}
    assert {threat: ATTACK.supports(threat) for threat in wanted} == wanted
    with pytest.raises(NotApplicableError, match="Uncertain"):
        ATTACK(nn.Flatten(), torch.rand(2, 1, 1, 3), torch.tensor([0, 1]), Lp("linf", 0.1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"confidence": 0.5}, "confidence"),
        ({"variance_factor": 0}, "variance_factor"),
        ({"targets": 0}, "targets"),
        ({"steps": 1.5}, "steps"),
        ({"step_size": 0}, "step_size"),
    ],
)
def test_faults_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HighConfidenceLowUncertainty(**settings)  # type: ignore[arg-type]
