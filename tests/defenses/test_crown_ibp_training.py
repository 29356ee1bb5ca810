from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.certify import CROWNIBP, bounds
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.defenses.certified_training import margins_specification
from robustbench_lite.defenses.crown_ibp_training import CROWNIBPTraining
from robustbench_lite.defenses.ibp_training import IBPTraining
from tests.defenses.certified_cases import (
    CLASSES,
    batch,
    convolutional,
    killed_and_resumed,
    linear,
    loss_at,
    standard_on_digits,
    tiny,
    trained_on_digits,
    worst_linear_loss,
)

EPS = 0.1


def upper(objective: IBPTraining, model: nn.Module, x: Tensor, y: Tensor, share: float = 1.0) -> Tensor:
    specification = margins_specification(y, CLASSES, x.dtype)
    return objective.upper(model, objective.ball(x, share), specification, share)


def by_hand(model: nn.Module, x: np.ndarray, y: int, eps: float) -> list[float]:
    """CROWN-IBP bounds of z_j - z_y, j != y, for one hidden layer: neuron by neuron, from the paper's lines."""
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in model.parameters())
    low, high = np.maximum(x - eps, 0), np.minimum(x + eps, 1)
    found = []
    for j in (j for j in range(CLASSES) if j != y):
        slope, shift = np.zeros_like(x), b2[j] - b2[y]
        for a, w, b in zip(w2[j] - w2[y], w1, b1, strict=True):
            u = b + np.maximum(w, 0) @ high + np.minimum(w, 0) @ low
            l = b + np.maximum(w, 0) @ low + np.minimum(w, 0) @ high  # noqa: E741
            if l >= 0:
                line = (1.0, 0.0)
            elif u <= 0:
                line = (0.0, 0.0)
            elif a > 0:
                line = (u / (u - l), -u * l / (u - l))
            else:
                line = (1.0 if u >= -l else 0.0, 0.0)
            slope, shift = slope + a * line[0] * w, shift + a * (line[0] * b + line[1])
        found.append(shift + np.maximum(slope, 0) @ high + np.minimum(slope, 0) @ low)
    return found


def test_kept_linear_bounds_are_those_of_the_paper_cut_with_interval_bounds() -> None:
    model, b = tiny(), batch()
    objective = CROWNIBPTraining(EPS, beta=1.0)
    found = upper(objective, model, b.x, b.y).detach()
    intervals = upper(IBPTraining(EPS), model, b.x, b.y).detach()
    linear_ones = torch.tensor(
        [by_hand(model, x, y, EPS) for x, y in zip(b.x.flatten(1).double().numpy(), b.y.tolist(), strict=True)]
    ).float()
    torch.testing.assert_close(found, torch.minimum(linear_ones, intervals))
    assert (linear_ones < intervals - 1e-3).any()  # or there would be nothing to tell them by


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_two_bounds_are_mixed_as_the_schedule_says(beta: float, share: float) -> None:
    model, b = convolutional(), batch()
    objective = CROWNIBPTraining(0.3, beta=beta)
    box, specification = objective.ball(b.x, share), margins_specification(b.y, CLASSES)
    tight, loose = (bounds(model, box, method, specification)[1] for method in ("crown_ibp", "ibp"))
    now = 1 - share * (1 - beta)
    assert (tight < loose - 1e-3).any()
    torch.testing.assert_close(upper(objective, model, b.x, b.y, share), now * tight + (1 - now) * loose)


def test_at_the_end_with_beta_0_it_is_ibp_training_to_the_bit() -> None:
    model, b = convolutional(), batch()
    for kappa in (0.0, 0.5):
        mine, theirs = CROWNIBPTraining(EPS, kappa=kappa), IBPTraining(EPS, kappa=kappa)
        assert torch.equal(loss_at(mine, model, b), loss_at(theirs, model, b))
        assert float(loss_at(mine, model, b, 0.1).detach()) < float(loss_at(theirs, model, b, 0.1).detach())


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_linear_net_has_the_closed_form(beta: float) -> None:
    model, b = linear(CLASSES), batch()
    loss = loss_at(CROWNIBPTraining(EPS, kappa=0, beta=beta), model, b)
    assert float(loss.detach()) == pytest.approx(worst_linear_loss(model, b, EPS), rel=1e-5)


@pytest.mark.parametrize("make", [tiny, convolutional])
@pytest.mark.parametrize("eps", [0.02, 0.3])
def test_gradients_are_those_of_finite_differences(make: Callable[[], nn.Module], eps: float) -> None:
    model, b = make().double(), batch()
    objective = CROWNIBPTraining(eps, beta=0.7)
    parameters = list(model.parameters())

    def value() -> Tensor:  # a smooth function of all bounds at once
        found = upper(objective, model, b.x.double(), b.y, 0.9)
        return found.logsumexp(dim=1).mean()

    gradients = torch.autograd.grad(value(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        ends = []
        with torch.no_grad():
            for h in (1e-6, -2e-6):
                parameter.add_(direction, alpha=h)
                ends.append(float(value()))
            parameter.add_(direction, alpha=1e-6)
        expected = (ends[0] - ends[1]) / 2e-6
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_it_certifies_what_standard_training_does_not() -> None:
    held_out, threat = load_data("digits", "test"), Lp("linf", 0.1)
    model = trained_on_digits(CROWNIBPTraining(0.1, warmup=0.1, ramp=0.4, beta=0.5))

    def proven(net: nn.Module) -> float:
        return float(CROWNIBP()(net, held_out.images, held_out.labels, threat).certified.float().mean())

    assert proven(model) > proven(standard_on_digits()) + 0.2


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = CROWNIBPTraining(EPS, warmup=0.1, ramp=0.8)
    assert killed_and_resumed(objective, tmp_path / "run.pt", monkeypatch)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("beta is the share", lambda: CROWNIBPTraining(0.1, beta=1.5)),
        ("beta is the share", lambda: CROWNIBPTraining(0.1, beta=float("nan"))),
        ("kappa is the share", lambda: CROWNIBPTraining(0.1, kappa=-1)),
        ("eps must be > 0", lambda: CROWNIBPTraining(0)),
    ],
)
def test_bad_arguments_are_refused(message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        make()
