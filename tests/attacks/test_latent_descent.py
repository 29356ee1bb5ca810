from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.attacks.latent_descent import LatentDescent
from robustbench_lite.core.errors import NotApplicableError
from robustbench_lite.core.goals import Targeted
from robustbench_lite.core.threats import Lp

NORMS = ["linf", "l2", "l1", "l0"]


class Prototypes(nn.Module):
    """One prototype a class, the best reconstruction of whatever comes."""

    centres: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("centres", torch.rand(4, 1, 6, 6, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return -(x[:, None] - self.centres).square().flatten(2).sum(dim=2)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.centres.expand(len(x), -1, -1, -1, -1)


def near_prototypes(n: int = 8) -> tuple[Tensor, Tensor]:
    y = torch.arange(n) % 4
    noise = torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (0.85 * Prototypes().centres[y] + 0.15 * noise), y


def crossing(x: Tensor, y: Tensor, towards: Tensor) -> Tensor:
    """Where the straight lines to prototypes leave the class, as l2 distances: lines cross hyperplanes."""
    centres, found = Prototypes().centres.flatten(1), []
    for one, label, target in zip(x.flatten(1), y, towards, strict=True):
        d = centres[target] - one
        shares = []
        for c in range(4):
            if c != label:
                lead = (one - centres[c]).square().sum() - (one - centres[label]).square().sum()
                slope = 2 * d @ (centres[c] - centres[label])
                shares.append(torch.where(slope > 0, lead / slope, torch.inf))
        found.append(torch.stack(shares).min() * d.norm())
    return torch.stack(found)


def test_in_l2_it_stops_where_the_line_to_the_nearest_other_class_crosses() -> None:
    x, y = near_prototypes()
    distances = -Prototypes()(x)
    nearest = distances.scatter(1, y[:, None], torch.inf).argmin(dim=1)
    found = LatentDescent()(Prototypes(), x, y, Lp("l2", None))
    expected = crossing(x, y, nearest)
    assert found.success.all()
    assert (found.distance >= expected - 1e-9).all()
    assert torch.allclose(found.distance, expected, atol=float(distances.sqrt().max()) / 50 / 2**10)


def test_towards_a_target() -> None:
    x, y = near_prototypes()
    target = (y + 1) % 4
    found = LatentDescent()(Prototypes(), x, Targeted(target), Lp("l2", None))
    assert found.success.all()
    assert torch.equal(Prototypes()(found.x_adv).argmax(dim=1), target)


@pytest.mark.parametrize("norm", NORMS)
def test_successes_are_in_the_threat_and_fool_the_model(norm: str) -> None:
    x, y = near_prototypes()
    nearest = LatentDescent()(Prototypes(), x, y, Lp(norm, None))
    assert nearest.success.all()
    assert (Prototypes()(nearest.x_adv).argmax(dim=1) != y).all()
    for share in (0.6, 1.01):  # of the distances found
        eps = nearest.distance * share + (0.01 if share > 1 else 0)
        threat = Lp(norm, eps)
        found = LatentDescent()(Prototypes(), x, y, threat)
        assert threat.contains(found.x_adv, x).all()
        assert found.success.all() if share > 1 else not found.success.all()
        assert (Prototypes()(found.x_adv).argmax(dim=1) != y).eq(found.success).all()


@pytest.mark.parametrize("norm", NORMS)
def test_no_budget_is_exceeded_and_a_larger_one_does_not_hurt(norm: str) -> None:
    x, y = near_prototypes()
    last = torch.full((8,), torch.inf, dtype=torch.float64)
    for budget in (1, 2, 3, 20, 62):
        found = LatentDescent()(Prototypes(), x, y, Lp(norm, None), max_queries=budget)
        assert (found.forwards <= budget).all()
        assert (found.distance <= last).all()
        last = found.distance
    assert last.isfinite().all()
    assert (LatentDescent()(Prototypes(), x, y, Lp("l2", 0.1)).forwards == 1 + 1 + 1).all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_batch_changes_nothing(norm: str) -> None:
    x, y = near_prototypes()
    together = LatentDescent()(Prototypes(), x, y, Lp(norm, None))
    for row in range(8):
        alone = LatentDescent()(Prototypes(), x[row : row + 1], y[row : row + 1], Lp(norm, None))
        assert torch.equal(alone.x_adv[0], together.x_adv[row])
        assert alone.forwards[0] == together.forwards[row]


def test_more_halvings_come_nearer() -> None:
    x, y = near_prototypes()
    coarse, fine = (LatentDescent(points=5, halvings=k)(Prototypes(), x, y, Lp("l2", None)) for k in (0, 12))
    assert (fine.distance <= coarse.distance).all()
    assert (fine.distance < coarse.distance).any()


def test_what_it_refuses() -> None:
    x, y = near_prototypes()
    with pytest.raises(NotApplicableError, match="Generative"):
        LatentDescent()(nn.Flatten(), x, y, Lp("l2", None))
    for settings in ({"points": 0}, {"halvings": -1}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            LatentDescent(**settings)
