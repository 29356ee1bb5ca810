"""SmoothAdv: its gradient against autograd, its draws, and the contract of attacks on a real smoothed classifier."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.attacks import PGD, SmoothAdv, SmoothedGradient
from robustbench_lite.core.errors import NotApplicableError
from robustbench_lite.core.goals import Targeted, Untargeted
from robustbench_lite.core.losses import cross_entropy, margin
from robustbench_lite.core.models import predict
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp
from robustbench_lite.defenses import InputNoise, PixelDeflection, SmoothedClassifier

SIGMA = 0.2
THREATS = [Lp("linf", 0.2), Lp("l2", 1.0), Lp("l1", 4.0)]


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 3)).double().eval()


def defense(**other: Any) -> SmoothedClassifier:
    return SmoothedClassifier(net(), SIGMA, **({"n": 500, "draws": 100} | other)).eval()


def images(n: int = 6) -> Tensor:
    return torch.rand(n, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def labels(x: Tensor) -> Tensor:
    return net()(x).argmax(dim=1)


def streams(n: int = 6) -> Streams:
    return Streams.from_generator(torch.Generator().manual_seed(7), torch.arange(n) + 30)


def explicit(x: Tensor, y: Tensor, noise: Tensor, loss: Any) -> Tensor:
    """The gradient of the loss of log mean softmax over the draws, image by image."""
    rows = []
    for image, label, draws in zip(x, y, noise, strict=True):
        leaf = image.clone().requires_grad_()
        soft = net()(leaf + SIGMA * draws).softmax(dim=1).mean(dim=0).log()
        rows.append(torch.autograd.grad(loss(soft[None], Untargeted(label[None])).sum(), leaf)[0])
    return torch.stack(rows)


@pytest.mark.parametrize("loss", [cross_entropy, margin])
@pytest.mark.parametrize("memory", [None, 1])
def test_its_gradient_is_that_of_the_explicit_log_mean_softmax_of_the_same_draws(loss: Any, memory: int | None) -> None:
    x = images()
    y, rows, estimator = labels(x), torch.arange(6), SmoothedGradient(samples=5, run=2)
    noise = streams().fork(2).normal(5, 1, 6, 6, dtype=torch.float64)
    expected = explicit(x, y, noise, loss)
    with Oracle(defense(), x, Untargeted(y), Lp("l2", 1.0), memory_budget=memory) as oracle:
        oracle.judge_clean()
        before = oracle.forwards.clone()
        own = streams()
        first, again = (estimator(oracle, x, rows, loss, own) for _ in range(2))
        assert torch.allclose(first, expected, atol=1e-12)
        assert torch.equal(first, again)  # the draws are fixed
        some = estimator(oracle, x[[4, 1]], rows[[4, 1]], loss, own.take(torch.tensor([4, 1])))
        assert torch.allclose(some, expected[[4, 1]], atol=1e-12)  # and a sample's own
        spent = oracle.forwards - before
        assert oracle.backwards.tolist() == [2, 3, 2, 2, 3, 2]
    confirmed = spent - torch.tensor([2, 3, 2, 2, 3, 2]) * estimator.cost(oracle)
    assert ((confirmed == 0) | (confirmed >= 10)).all()  # votes about what looked like a success
    assert (confirmed == 0).sum() >= 3
    assert not torch.allclose(first, explicit(x, y, streams().fork(0).normal(5, 1, 6, 6, dtype=torch.float64), loss))


def test_draws_follow_their_images_into_the_chunks_of_a_small_memory() -> None:
    x, model, sizes = images(40), defense(), []
    y = labels(x)
    noise = streams(40).fork(0).normal(1, 1, 6, 6, dtype=torch.float64)
    with Oracle(model, x, Untargeted(y), Lp("l2", 1.0), memory_budget=2**18) as oracle:
        oracle.judge_clean()
        model.net.register_forward_pre_hook(lambda _, inputs: sizes.append((len(inputs[0]), inputs[0].requires_grad)))
        found = SmoothedGradient(samples=1)(oracle, x, torch.arange(40), cross_entropy, streams(40))
    with_gradient = [size for size, graph in sizes if graph]
    assert sum(with_gradient) == 40
    assert max(with_gradient) < min(40, oracle.capacity)  # a graph takes more than a probe: chunks within a chunk
    assert torch.allclose(found, explicit(x, y, noise, cross_entropy), atol=1e-12)


@pytest.mark.parametrize("threat", THREATS, ids=lambda t: t.norm)
def test_it_stays_in_the_threat_and_success_is_the_deployed_models(threat: Lp) -> None:
    model, x = defense(), images(12)
    y = labels(x)
    torch.manual_seed(0)
    found = SmoothAdv(steps=10, samples=8)(model, x, y, threat, max_queries=1000)
    assert threat.contains(found.x_adv, x).all()
    assert (found.forwards <= 1000).all()
    assert found.success.sum() >= 3
    answers = torch.stack([predict(model, found.x_adv) for _ in range(200)])
    wrong = (answers != y).double().mean(dim=0)[found.success]
    assert (wrong > 0.3).all()  # two majorities of 20 and 80 can be luck, but not by much


def test_a_batch_is_its_samples_one_by_one() -> None:
    """Iterates do not depend on draws of the model here: a large radius of the vote, so that no sample falls."""
    x, threat, attack = images(4), Lp("l2", 0.05), SmoothAdv(steps=4, samples=6, random_start=True)
    model, y = defense(draws=100), labels(x)
    keep = (net()(x).topk(2).values.diff(dim=1).abs() > 0.1).flatten()
    x, y = x[keep], y[keep]
    torch.manual_seed(0)
    together = attack(model, x, y, threat, stop="never", indices=torch.arange(len(x)) + 5)
    for row in range(len(x)):
        alone = attack(model, x[row : row + 1], y[row : row + 1], threat, stop="never", indices=torch.tensor([row + 5]))
        assert torch.equal(together.forwards[row : row + 1], alone.forwards)
        # of the same iterates another may be kept, for their losses are the model's random ones
        assert threat.distance(alone.x_adv, together.x_adv[row : row + 1]) < 0.11


def test_small_budgets_are_kept() -> None:
    x = images()
    for budget in (1, 2, 7, 40):
        found = SmoothAdv(steps=5, samples=4)(defense(), x, labels(x), Lp("linf", 0.05), max_queries=budget)
        assert (found.forwards <= budget).all()


def test_targets_are_pursued() -> None:
    x = images(8)
    target = (labels(x) + 1) % 3
    found = SmoothAdv(steps=15, samples=8)(defense(), x, Targeted(target), Lp("l2", 3.0))
    assert found.success.double().mean() > 0.6
    answers = predict(defense(), found.x_adv)
    assert ((answers == target) | ~found.success | (answers == -1)).double().mean() > 0.8


class Line(nn.Module):
    """Two classes; w x = 0.5 is the boundary, so that the distances are known."""

    def forward(self, x: Tensor) -> Tensor:
        lead = x.flatten(1)[:, :4].sum(dim=1) - 2
        return torch.stack([-lead, lead], dim=1)


def test_on_a_half_space_it_goes_straight_to_the_boundary() -> None:
    model = SmoothedClassifier(Line(), 0.1, n=500, draws=200)
    x = torch.full((4, 1, 6, 6), 0.6, dtype=torch.float64)  # 0.2 from the boundary in l2
    y = torch.ones(4, dtype=torch.int64)
    torch.manual_seed(0)
    assert SmoothAdv(steps=5, samples=4)(model, x, y, Lp("l2", 0.25)).success.all()
    assert not SmoothAdv(steps=5, samples=4)(model, x, y, Lp("l2", 0.1)).success.any()


def test_restarts_have_other_draws_and_another_start() -> None:
    x = images()
    single, double = (
        SmoothAdv(steps=3, samples=4, random_start=True, restarts=r)(defense(), x, labels(x), Lp("l2", 0.02))
        for r in (1, 2)
    )
    assert (double.forwards[~double.success] > single.forwards[~double.success]).all()
    assert [SmoothAdv(restarts=2).ascent(run).estimator for run in (0, 1)] == [SmoothedGradient(32, r) for r in (0, 1)]


def test_it_is_for_votes_under_noise_alone() -> None:
    x = images()
    for other in (net(), PixelDeflection(net())):  # the latter removes noise, and adds none
        with pytest.raises(NotApplicableError, match="Smoothed"):
            SmoothAdv()(other, x, labels(x), Lp("l2", 0.5))
    assert SmoothAdv(steps=2, samples=2)(InputNoise(net(), 0.1), x, labels(x), Lp("l2", 0.1)).x_adv.shape == x.shape


def test_a_net_that_only_hides_its_gradient_in_noise_falls_to_it() -> None:
    """Large logits: the softmax of one draw is flat, that of many is not."""
    x = images(12)
    y, sharp = labels(x), nn.Sequential(net(), Scale(50.0)).eval()
    torch.manual_seed(0)
    model = InputNoise(sharp, 0.3)
    threat = Lp("l2", 0.8)
    plain = PGD(steps=10)(model, x, y, threat).success.sum()
    assert SmoothAdv(steps=10, samples=32, loss="margin")(model, x, y, threat).success.sum() >= plain


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        ("samples", {"samples": 0}),
        ("steps", {"steps": 0}),
        ("restarts", {"restarts": 0}),
        ("loss", {"loss": "nothing"}),
        ("step_size", {"step_size": -1}),
    ],
)
def test_bad_arguments_are_refused(message: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        SmoothAdv(**settings)


def test_the_loss_is_the_cross_entropy_of_the_mean_not_the_mean_cross_entropy() -> None:
    x = images(2)
    y, noise = labels(x), streams(2).fork(0).normal(5, 1, 6, 6, dtype=torch.float64)
    with Oracle(defense(), x, Untargeted(y), Lp("l2", 1.0)) as oracle:
        oracle.judge_clean()
        found = SmoothedGradient(samples=5)(oracle, x, torch.arange(2), cross_entropy, streams(2))
    leaf = x.clone().requires_grad_()
    each = F.cross_entropy(
        net()((leaf[:, None] + SIGMA * noise).flatten(0, 1)), y.repeat_interleave(5), reduction="sum"
    )
    mean_of = torch.autograd.grad(each / 5, leaf)[0]
    assert F.cosine_similarity(found.flatten(), mean_of.flatten(), dim=0) > 0.5
    assert not torch.allclose(found, mean_of, atol=1e-6)
