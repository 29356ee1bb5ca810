"""The exact attack on 1-nearest neighbours: against a brute force, and against a solver of quadratic programmes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from robustbench_lite.attacks import NearestNeighbourAttack
from robustbench_lite.attacks._nearest_cells import Cells, nearest_point
from robustbench_lite.core.errors import NotApplicableError
from robustbench_lite.core.goals import Targeted
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.data.base import Dataset
from robustbench_lite.defenses import NearestNeighbour

UNLIMITED = Lp("l2", None)


def fitted(n: int, size: int, seed: int = 0, rare: Tensor | None = None) -> NearestNeighbour:
    """Return a defense of three classes in turn, or of two and the third where the image nearest to `rare` is."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.rand(n, 1, size, size, generator=generator), torch.arange(n) % 3
    if rare is not None:
        nearest = torch.cdist(rare.flatten().unsqueeze(0), images.flatten(1)).argmin()
        labels = (torch.arange(n) % 2).index_fill(0, nearest, 2)
    data = Dataset("noise", "train", images, labels, torch.arange(n), 3)
    defense = NearestNeighbour(nn.Identity()).eval()
    defense.fit(data)
    return defense


def queries(n: int, size: int, edge: float = 0.0) -> Tensor:
    """Return images; `edge` is the share of pixels at a bound."""
    generator = torch.Generator().manual_seed(7)
    x = torch.rand(n, 1, size, size, generator=generator)
    pinned = torch.rand(x.shape, generator=generator) < edge
    return torch.where(pinned, x.round(), x)


def exact(defense: NearestNeighbour, x: Tensor, y: int) -> float:
    """Return the distance to the nearest image with a label other than y, by a solver, cell by cell."""
    points, labels = defense.points.double().numpy(), defense.reference_labels.numpy()
    own, best, image = points[labels == y], np.inf, x.double().flatten().numpy()
    for other in points[labels != y]:
        normals, offsets = own - other, ((own**2).sum(axis=1) - (other**2).sum()) / 2
        cell = {"type": "ineq", "fun": lambda p, a=normals, b=offsets: b - a @ p, "jac": lambda _, a=normals: -a}
        found = minimize(
            lambda p: ((p - image) ** 2).sum(), other, jac=lambda p: 2 * (p - image), bounds=[(0, 1)] * len(image),
            constraints=[cell], method="SLSQP", options={"ftol": 1e-12, "maxiter": 300},
        )  # fmt: skip
        best = min(best, float(np.linalg.norm(found.x - image)))
    return best


@pytest.mark.parametrize("edge", [0.0, 0.5])
def test_it_finds_the_exact_distance(edge: float) -> None:
    defense, x = fitted(30, 3), queries(8, 3, edge)
    y = defense.predict(x)
    found = NearestNeighbourAttack(ascents=200)(defense, x, y, UNLIMITED)
    assert found.success.all()
    for image, label, distance in zip(x, y.tolist(), found.distance.tolist(), strict=True):
        best = exact(defense, image, label)
        assert best - 1e-5 <= distance <= best + 1e-3
    assert (((found.x_adv - 0.5).abs() > 0.4999).double().mean() > 0.1) == (edge > 0)


def test_a_bound_says_which_cells_to_leave_out() -> None:
    defense, x = NearestNeighbour(nn.Identity()), load_data("digits").images[:60]
    defense.fit(load_data("digits", split="train"))
    y = defense.predict(x)
    some, all_ = (NearestNeighbourAttack(cells=cells)(defense, x, y, UNLIMITED) for cells in (40, 1000))
    assert torch.equal(some.distance, all_.distance)
    assert (all_.forwards < 40 * 8 / 2).double().mean() > 0.9  # most cells were never tried
    one = NearestNeighbourAttack(cells=1)(defense, x, y, UNLIMITED)
    assert (one.distance >= all_.distance).all()
    assert (one.distance > all_.distance).any()


def test_with_a_budget_it_succeeds_where_the_distance_allows() -> None:
    defense, x = fitted(60, 4), queries(20, 4)
    y = defense.predict(x)
    distance = NearestNeighbourAttack(cells=60)(defense, x, y, UNLIMITED).distance
    eps = float(distance.median())
    found = NearestNeighbourAttack(cells=60)(defense, x, y, Lp("l2", eps))
    assert torch.equal(found.success, distance <= eps)
    each = NearestNeighbourAttack(cells=60)(defense, x, y, Lp("l2", distance + 1e-4))
    assert each.success.all()


def test_a_batch_of_n_is_n_batches_of_one_in_blocks_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    defense, x = fitted(60, 4).double(), queries(6, 4).double()
    y, attack = defense.predict(x), NearestNeighbourAttack()
    whole = attack(defense, x, y, UNLIMITED)
    for row in range(6):
        one = attack(defense, x[row : row + 1], y[row : row + 1], UNLIMITED)
        assert torch.allclose(one.x_adv[0], whole.x_adv[row], atol=1e-10)
        assert one.forwards[0] == whole.forwards[row]
    monkeypatch.setattr("robustbench_lite.attacks.nearest_neighbour_attack.BLOCK", 120)
    again = attack(defense, x, y, UNLIMITED, memory_budget=5000)
    assert torch.allclose(again.x_adv, whole.x_adv, atol=1e-10)
    assert torch.equal(again.forwards, whole.forwards)


def test_a_rare_class_does_not_cut_what_the_others_get() -> None:
    x = queries(6, 8)
    defense, x = fitted(60, 8, rare=x[0]).double(), x.double()
    y, attack = defense.predict(x), NearestNeighbourAttack(rounds=1)
    assert y.unique().tolist() == [0, 1, 2]
    whole = attack(defense, x, y, UNLIMITED)
    assert whole.success.all()
    for row in range(6):
        one = attack(defense, x[row : row + 1], y[row : row + 1], UNLIMITED)
        assert torch.allclose(one.x_adv[0], whole.x_adv[row], atol=1e-10)


def test_the_cells_of_a_class_with_one_sample_are_half_spaces() -> None:
    generator = torch.Generator().manual_seed(0)
    points, x = (torch.rand(n, 5, dtype=torch.float64, generator=generator) for n in (9, 1))
    far, wanted = torch.cdist(x, points).square(), torch.arange(9).unsqueeze(0) > 0
    cells = Cells.around(x, points, wanted, far, 9)
    for number in range(8):
        other = points[cells.centres[0, number]]
        normal, middle = nn.functional.normalize(points[0] - other, dim=0), (points[0] + other) / 2
        exact = x - ((x - middle) @ normal).clamp_min(0).unsqueeze(1) * normal
        programme = nearest_point(cells.programme(number, (-9.0, 9.0)).with_nearest(far, wanted, 8), 50)
        assert torch.allclose(programme.point, exact, atol=1e-9)
        assert torch.allclose(programme.inside(torch.cdist(exact, points).square(), wanted, 0.0), exact, atol=1e-9)


def test_a_cell_that_only_a_twin_bounds_has_no_half_space() -> None:
    point = torch.rand(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted, far = torch.tensor([[False, True, True]]), torch.tensor([[0.0, 0.0, 1.0]]).double()
    cells = Cells.around(point, torch.cat([point, point, 1 - point]), wanted, far, 1)
    programme = cells.programme(0, (0.0, 1.0)).with_nearest(far, wanted, 8)
    assert torch.equal(nearest_point(programme, 5).point, point)


@pytest.mark.parametrize("budget", [1, 2, 8, 9, 20])
def test_budgets_are_kept(budget: int) -> None:
    defense, x = fitted(60, 4), queries(6, 4)
    found = NearestNeighbourAttack()(defense, x, defense.predict(x), UNLIMITED, max_queries=budget)
    assert (found.forwards <= budget).all()
    assert found.success.any() == (budget >= 9)  # the clean image, its distances, six rounds, a verdict


def test_a_target_is_reached_at_the_nearest_of_its_cells() -> None:
    defense, x = fitted(60, 4), queries(9, 4)
    y = defense.predict(x)
    targeted = [NearestNeighbourAttack(cells=60)(defense, x, Targeted((y + k) % 3), UNLIMITED) for k in (1, 2)]
    assert all(found.success.all() for found in targeted)
    nearest = torch.minimum(targeted[0].distance, targeted[1].distance)
    free = NearestNeighbourAttack(cells=60)(defense, x, y, UNLIMITED)
    assert torch.allclose(free.distance, nearest, atol=1e-3)


def test_other_bounds_are_kept() -> None:
    defense = fitted(40, 3)
    defense.points = 3 * defense.points - 1
    x = 3 * queries(6, 3, 0.5) - 1
    threat = Lp("l2", None, (-1.0, 2.0))
    found = NearestNeighbourAttack()(defense, x, defense.predict(x), threat)
    assert found.success.all()
    assert threat.contains(found.x_adv, x).all()


def test_defenses_threats_and_settings_that_do_not_fit_are_named() -> None:
    class Two(NearestNeighbour):
        k = 2

    x, y = queries(3, 4), torch.zeros(3, dtype=torch.int64)
    two = Two(nn.Identity())
    two.fit(Dataset("noise", "train", queries(9, 4), torch.arange(9) % 3, torch.arange(9), 3))
    with pytest.raises(NotApplicableError, match="DeepKNNAttack"):
        NearestNeighbourAttack()(two, x, y, UNLIMITED)
    with pytest.raises(NotApplicableError, match="Neighbours"):
        NearestNeighbourAttack()(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), x, y, UNLIMITED)
    assert not NearestNeighbourAttack().supports(Lp("linf", 0.3))
    assert [type(found) for found in fitted(9, 3).adaptive_attacks(UNLIMITED)] == [NearestNeighbourAttack]
    assert fitted(9, 3).adaptive_attacks(Lp("linf", 0.1)) == []
    for name in ("cells", "rounds", "added", "ascents"):
        with pytest.raises(ValueError, match=name):
            NearestNeighbourAttack(**{name: 0})
