from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import entropy
from torch.nn import functional as F

from robustbench_lite.core.models import frozen
from robustbench_lite.core.spatial import RotationTranslation
from robustbench_lite.core.threats import Lp
from robustbench_lite.defenses._divergence import DivergenceAscent, FarFrom, kl_divergence
from robustbench_lite.defenses.base import Step
from robustbench_lite.defenses.trades import TRADES
from tests.defenses.training_cases import (
    EPS,
    LAST,
    batch,
    expect_one_pass,
    expect_resumable,
    linear,
    normalised,
    robust_accuracy,
    streams,
    trained,
)


def test_the_divergence_is_that_of_scipy() -> None:
    p, q = 5 * torch.randn(2, 20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = entropy(p.softmax(1), q.softmax(1), axis=1)
    torch.testing.assert_close(kl_divergence(p, q), torch.from_numpy(expected))


def test_the_loss_is_cross_entropy_plus_beta_times_the_divergence_and_so_is_its_gradient() -> None:
    model, b = linear(), batch()
    objective = TRADES(Lp("linf", 0.1), beta=3.0)
    x_adv = objective.examples(model, b, 1.0, streams(b))
    loss = objective.loss(model, b, LAST, None, streams(b))
    weights = tuple(model.parameters())
    clean, moved = model(b.x), model(x_adv)
    divergence = F.kl_div(moved.log_softmax(1), clean.softmax(1), reduction="batchmean")
    expected = F.cross_entropy(clean, b.y) + 3 * divergence
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_the_inner_maximum_of_a_linear_net_lies_at_an_end() -> None:
    """Of two classes only the difference of the logits counts; it ends at d - eps |w|_1 or d + eps |w|_1."""
    model, b, eps = linear(classes=2), batch(classes=2), 0.2
    x_adv = TRADES(Lp("linf", eps)).examples(model, b, 1.0, streams(b))
    with torch.no_grad():
        weight, d = model[1].weight[0] - model[1].weight[1], model(b.x) @ torch.tensor([1.0, -1.0])
        reach, p = eps * weight.abs().sum(), d.sigmoid()
        ends = torch.stack([d - reach, d + reach]).sigmoid()
        closed = p * (p / ends).log() + (1 - p) * ((1 - p) / (1 - ends)).log()
        found = kl_divergence(model(b.x), model(x_adv))
    assert (closed - found).abs().amin(dim=0).max() < 1e-4
    assert (found > 0.5 * closed.amax(dim=0)).all()


def test_the_ascent_climbs_the_divergence_from_the_clean_prediction_and_not_to_it() -> None:
    """Of three classes the two directions differ."""
    clean, moved = 3 * torch.randn(2, 20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    climbed = DivergenceAscent().ascent().loss(moved, FarFrom(torch.zeros(20, dtype=torch.int64), clean))
    torch.testing.assert_close(climbed, torch.from_numpy(entropy(clean.softmax(1), moved.softmax(1), axis=1)))


@pytest.mark.parametrize("threat", [Lp("linf", 0.1), Lp("l2", 0.5), Lp("l1", 1.0)], ids=lambda t: t.norm)
def test_examples_lie_in_the_threat_and_are_told_apart_more_than_noise(threat: Lp) -> None:
    model, b = normalised(), batch()
    objective = TRADES(threat)
    x_adv = objective.examples(model, b, 1.0, streams(b))
    assert threat.contains(x_adv, b.x).all()
    assert not x_adv.requires_grad
    noise = threat.random_point(b.x, streams(b, 1))
    with frozen(model), torch.no_grad():
        far, near = (kl_divergence(model(b.x), model(x)) for x in (x_adv, noise))
    assert (far > near).all()
    half = objective.examples(model, b, 0.5, streams(b))
    assert (threat.distance(half, b.x) <= threat.eps / 2 + 1e-6).all()


def test_each_sample_is_judged_by_its_own_clean_logits() -> None:
    """The answer depends neither on the neighbours nor on the chunks in which the net is asked."""
    model, b, threat = normalised().eval(), batch(), Lp("linf", 0.1)
    with torch.no_grad():
        clean = model(b.x)
    attack = DivergenceAscent(steps=5)

    def run(rows: list[int], memory: int | None = None) -> torch.Tensor:
        goal = FarFrom(b.y[rows], clean[rows])
        options: dict[str, Any] = {"stop": "never", "indices": b.indices[rows], "memory_budget": memory}
        return attack(model, b.x[rows], goal, threat, **options).x_adv

    whole = run(list(range(8)))
    torch.testing.assert_close(run([5, 1, 6]), whole[[5, 1, 6]])
    torch.testing.assert_close(run(list(range(8)), memory=4000), whole)


def test_examples_are_made_in_eval_mode_and_learnt_from_in_train_mode_in_one_pass() -> None:
    expect_one_pass(TRADES(Lp("linf", 0.1), steps=3))


def test_the_start_draws_from_the_streams_of_the_step() -> None:
    model, b = normalised(), batch()
    first, again, other = (TRADES(Lp("l2", 0.5)).examples(model, b, 1.0, streams(b, seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_warm_up_is_the_clean_loss() -> None:
    model, b = linear(), batch()
    loss = TRADES(Lp("linf", 0.1), warmup=0.2).loss(model, b, Step(10, 100, 0), None, streams(b))
    torch.testing.assert_close(loss, F.cross_entropy(model(b.x), b.y))


def test_it_raises_accuracy_under_attack() -> None:
    assert robust_accuracy(trained(TRADES(Lp("linf", EPS), steps=4, ramp=0.3))) > robust_accuracy() + 0.2


def test_a_killed_training_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_resumable(TRADES(Lp("linf", 0.1), steps=2, ramp=0.5), tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("beta is the weight", lambda: TRADES(Lp("linf", 0.1), beta=-1)),
        ("beta is the weight", lambda: TRADES(Lp("linf", 0.1), beta=float("nan"))),
        ("steps must be", lambda: TRADES(Lp("linf", 0.1), steps=0)),
        ("step_size must be > 0", lambda: TRADES(Lp("linf", 0.1), step_size=0.0)),
        ("sigma is the standard deviation", lambda: TRADES(Lp("linf", 0.1), sigma=0.0)),
        ("together <= 1", lambda: TRADES(Lp("linf", 0.1), warmup=0.6, ramp=0.6)),
        ("whose eps is one number", lambda: TRADES(Lp("linf", None))),
        ("does not support", lambda: TRADES(RotationTranslation())),
    ],
)
def test_bad_arguments_are_refused(message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        make()
