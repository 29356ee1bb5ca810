from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from robustbench_lite.defenses.logit_squeezing import LogitSqueezing
from tests.defenses.training_cases import LAST, batch, expect_resumable, linear, streams, trained, weak_and_strong


def test_it_adds_the_mean_norm_of_the_logits() -> None:
    model, b = linear(), batch()
    loss = LogitSqueezing(weight=0.7, sigma=0.0).loss(model, b, LAST, None, streams(b))
    z = model(b.x)
    norms = [(z[i, 0] ** 2 + z[i, 1] ** 2 + z[i, 2] ** 2).sqrt() for i in range(8)]
    torch.testing.assert_close(loss, F.cross_entropy(z, b.y) + 0.7 * sum(norms) / 8)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_logits_of_zero_have_a_gradient() -> None:
    model, b = linear(), batch()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    LogitSqueezing().loss(model, b, LAST, None, streams(b)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_images_carry_noise_of_sigma() -> None:
    model, b = linear(), batch(400)
    seen: list[torch.Tensor] = []
    model.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    for seed in (0, 0, 1):
        LogitSqueezing(sigma=0.5).loss(model, b, LAST, None, streams(b, seed))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert abs(float((seen[0] - b.x).std()) - 0.5) < 0.02


def test_it_looks_more_robust_than_it_is() -> None:
    weak, strong = weak_and_strong(trained(LogitSqueezing()))
    assert weak > weak_and_strong()[0] + 0.1
    assert weak > strong + 0.05


def test_a_killed_training_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_resumable(LogitSqueezing(), tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("message", "options"),
    [("weight is the weight", {"weight": -1.0}), ("sigma is the standard deviation", {"sigma": -0.5})],
)
def test_bad_arguments_are_refused(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        LogitSqueezing(**options)
