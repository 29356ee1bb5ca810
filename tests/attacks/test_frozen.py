"""Frozen randomness."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustbench_lite.attacks import EOT, FGSM, Frozen
from robustbench_lite.core.threats import Lp


class Noisy(nn.Module):
    """Logits (s, -s) of the sum of the pixels less 8, and of noise."""

    stochastic = True

    def forward(self, x: Tensor) -> Tensor:
        lead = (x + 0.02 * torch.randn_like(x)).flatten(1).sum(dim=1) - 8.0
        return torch.stack([lead, -lead], dim=1)


def test_one_draw_for_all_calls_and_no_trace() -> None:
    x = torch.rand(5, 1, 4, 4)
    before = torch.get_rng_state()
    first, again, other = (Frozen(Noisy(), seed)(x) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(3)
    assert torch.equal(Noisy()(x), first)


def test_gradients_pass_and_costs_add_up() -> None:
    x = torch.rand(5, 1, 4, 4, requires_grad=True)
    (slope,) = torch.autograd.grad(Frozen(Noisy())(x)[:, 0].sum(), x)
    assert torch.equal(slope, torch.ones_like(x))
    assert Frozen(EOT(Noisy(), samples=7)).cost == 7


def test_as_a_view_of_an_attack() -> None:
    x = torch.full((4, 1, 4, 4), 0.6)
    y, threat = torch.zeros(4, dtype=torch.int64), Lp("linf", 0.3)
    found = FGSM()(Noisy(), x, y, threat, view=Frozen(Noisy()))
    assert found.success.all()
    assert torch.allclose(found.x_adv, torch.full_like(x, 0.3), atol=1e-6)  # down with every pixel: 16 * 0.3 < 8
