from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.certify.intervals import Interval
from robustbench_lite.data import load_data
from robustbench_lite.defenses.ibp_training import IBPTraining
from robustbench_lite.defenses.sabr_training import SABRTraining
from robustbench_lite.defenses.short_schedule import (
    ShortSchedule,
    balance_loss,
    relu_inputs,
    rescale_for_intervals,
    tightness_loss,
)
from robustbench_lite.defenses.standard import StandardTraining
from tests.defenses.certified_cases import batch, convolutional, killed_and_resumed, loss_at, tiny

RAMP: dict[str, Any] = {"warmup": 0.1, "ramp": 0.5}


def deep(width: int = 200, layers: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    parts: list[nn.Module] = [nn.Flatten()]
    for _ in range(layers):
        parts += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(width, 10))


def widths(model: nn.Module, x: Tensor, eps: float) -> list[float]:
    return [float((z.upper - z.lower).detach().mean()) for z in relu_inputs(model, (x - eps, x + eps))]


def test_the_initialisation_hands_the_width_of_boxes_on() -> None:
    model, x = deep(), torch.rand(20, 1, 10, 20)
    before = widths(model, x, 0.01)
    assert before[-1] > 50 * before[0]  # what it is for
    rescale_for_intervals(model)
    after = widths(model, x, 0.01)
    assert after[0] == pytest.approx(2 * 0.02, rel=0.02)  # of the first layer there is no ReLU before it
    for one, next_one in pairwise(after):
        assert next_one / one == pytest.approx(1, abs=0.2)


def test_it_sets_the_mean_magnitude_of_every_layer_and_no_other_thing() -> None:
    model = convolutional()
    before = [p.detach().clone() for p in model.parameters()]
    rescale_for_intervals(model)
    fans = [4, 12, 4]
    for k, fan in enumerate(fans):
        (weight, bias), (old, old_bias) = list(model.parameters())[2 * k : 2 * k + 2], before[2 * k : 2 * k + 2]
        assert float(weight.detach().abs().mean()) == pytest.approx(2 / fan, rel=1e-5)
        factor = (weight / old).detach().flatten()
        torch.testing.assert_close(factor, factor[:1].expand_as(factor))
        torch.testing.assert_close(bias.detach(), old_bias * factor[0])
    normal = torch.distributions.Normal(0.0, (2 * torch.pi) ** 0.5 / 12)  # the original's law for a fan-in of 12
    assert float(normal.sample((200_000,)).abs().mean()) == pytest.approx(2 / 12, rel=0.01)


def test_a_layer_of_zeros_stays() -> None:
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    rescale_for_intervals(layer)
    assert not layer.weight.any()
    assert layer.bias.isfinite().all()


def interval(lower: list[float], upper: list[float]) -> Interval:
    return Interval(torch.tensor([lower]), torch.tensor([upper]))


def test_tightness_is_the_papers() -> None:
    box = (torch.zeros(2, 1, 1, 2), torch.full((2, 1, 1, 2), 0.2))
    hidden = [interval([0.0, 0.0], [0.3, 0.3]), interval([0.0, -1.0], [1.0, 0.0]), interval([0.0, 0.0], [2.0, 6.0])]
    # ratios 0.2 / 0.3, 0.2 / 1, 0.2 / 4; tau = 0.5
    expected = (0 + 0.3 / 0.5 + 0.45 / 0.5) / 3
    assert float(tightness_loss(box, hidden, 0.5)) == pytest.approx(expected, rel=1e-5)


def test_balance_is_the_papers() -> None:
    z = interval([1.0, -1.0, -4.0, 3.0], [3.0, 1.0, -2.0, 5.0])  # centres 2 on, 0 undecided, -3 off, 4 on; mean 0.75
    first = 3 / 6  # off over on
    on, off = 1.25**2 + 3.25**2, 3.75**2
    second = on / off
    assert second < 1
    expected = (max(0.9 - first, 0) + max(0.9 - second, 0)) / 0.9
    assert float(balance_loss([z], 0.9)) == pytest.approx(expected, rel=1e-5)
    even = interval([1.0, -3.0], [3.0, -1.0])
    assert float(balance_loss([even], 0.9)) == 0
    assert float(balance_loss([even, z], 0.9)) == pytest.approx(expected / 2, rel=1e-5)


def test_a_layer_without_ReLUs_on_or_off_costs_all_and_has_a_finite_gradient() -> None:  # noqa: N802
    lower = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    loss = balance_loss([Interval(lower, torch.tensor([[1.0, 2.0]]))], 0.5)
    assert float(loss.detach()) == pytest.approx(2.0)
    loss.backward()
    assert lower.grad is not None
    assert lower.grad.isfinite().all()


def test_hidden_boxes_are_those_of_the_layers_before_relus() -> None:
    model, b = tiny(), batch()
    found = relu_inputs(model, (b.x, b.x))
    assert len(found) == 1
    torch.testing.assert_close(found[0].lower, model[1](b.x.flatten(1)))


@pytest.mark.parametrize("inner", [IBPTraining(0.2, **RAMP), SABRTraining(0.2, **RAMP)], ids=["ibp", "sabr"])
def test_the_regularisers_fade_as_the_ball_grows(inner: IBPTraining) -> None:
    model, b = convolutional(), batch()
    outer = ShortSchedule(inner, weight=0.8, tolerance=0.5)
    for progress, share in ((0.0, 0.0), (0.35, 0.5), (0.6, 1.0), (0.99, 1.0)):
        extra = float((loss_at(outer, model, b, progress) - loss_at(inner, model, b, progress)).detach())
        box = inner.ball(b.x, max(share, 1e-3))
        hidden = relu_inputs(model, box)
        expected = 0.8 * (1 - share) * float((tightness_loss(box, hidden, 0.5) + balance_loss(hidden, 0.5)).detach())
        assert extra == pytest.approx(expected, abs=1e-5)
        assert (expected > 0.01) == (share < 1)


def test_descending_on_them_tightens_boxes_and_balances_relus() -> None:
    model, x = deep(64, 3), load_data("digits", "train").head(200).images
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.bias.sub_(0.2)  # most ReLUs off
    box = IBPTraining(0.1).ball(x, 0.1)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=2e-3), []
    for _ in range(40):
        hidden = relu_inputs(model, box)
        losses.append(torch.stack([tightness_loss(box, hidden, 0.5), balance_loss(hidden, 0.5)]))
        optimizer.zero_grad()
        losses[-1].sum().backward()
        optimizer.step()
    assert bool((losses[0] > 0.3).all())
    assert bool((losses[-1] < losses[0] / 2).all())


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = ShortSchedule(IBPTraining(0.1, **RAMP))
    assert killed_and_resumed(objective, tmp_path / "run.pt", monkeypatch)


def test_a_net_without_relus_is_refused() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ValueError, match="this net has none"):
        ShortSchedule(IBPTraining(0.1)).setup(net, load_data("digits", "train"))


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (TypeError, "wraps a certified training", lambda: ShortSchedule(StandardTraining())),  # type: ignore[arg-type]
        (ValueError, "must be >= 0", lambda: ShortSchedule(IBPTraining(0.1), weight=-1)),
        (ValueError, "must be >= 0", lambda: ShortSchedule(IBPTraining(0.1), weight=float("nan"))),
        (ValueError, r"in \(0, 1\]", lambda: ShortSchedule(IBPTraining(0.1), tolerance=0)),
    ],
)
def test_bad_arguments_are_refused(error: type[Exception], message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message):
        make()
