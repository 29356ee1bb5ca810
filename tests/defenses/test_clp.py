from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from robustbench_lite.defenses.clp import CLP
from tests.defenses.training_cases import LAST, batch, expect_resumable, linear, streams, trained, weak_and_strong


@pytest.mark.parametrize("n", [8, 7, 2])
def test_it_pairs_the_halves_of_the_batch(n: int) -> None:
    model, b = linear(), batch(n)
    loss = CLP(weight=3.0, sigma=0.0).loss(model, b, LAST, None, streams(b))
    z, half = model(b.x), n // 2
    pairs = [((z[i] - z[half + i]) ** 2).mean() for i in range(half)]
    torch.testing.assert_close(loss, F.cross_entropy(z, b.y) + 3 * sum(pairs) / half)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_one_image_has_no_partner() -> None:
    model, b = linear(), batch(1)
    torch.testing.assert_close(CLP(sigma=0.0).loss(model, b, LAST, None, streams(b)), F.cross_entropy(model(b.x), b.y))


def test_images_carry_noise_of_sigma() -> None:
    model, b = linear(), batch(400)
    seen: list[torch.Tensor] = []
    model.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    for seed in (0, 0, 1):
        CLP(sigma=0.5).loss(model, b, LAST, None, streams(b, seed))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    noise = seen[0] - b.x
    assert abs(float(noise.std()) - 0.5) < 0.02
    assert abs(float(noise.mean())) < 0.03
    assert float(seen[0].min()) < 0  # not cut


def test_it_looks_more_robust_than_it_is() -> None:
    weak, strong = weak_and_strong(trained(CLP()))
    assert weak > weak_and_strong()[0] + 0.1
    assert weak > strong + 0.05


def test_a_killed_training_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_resumable(CLP(), tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("message", "options"),
    [("weight is the weight", {"weight": -1.0}), ("sigma is the standard deviation", {"sigma": float("nan")})],
)
def test_bad_arguments_are_refused(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        CLP(**options)
