from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.attacks.fgsm import FGSM
from robustbench_lite.attacks.pgd import PGD
from robustbench_lite.core.threats import Lp
from robustbench_lite.data.base import Dataset
from robustbench_lite.defenses.base import Step
from robustbench_lite.defenses.ensemble_adversarial_training import EnsembleAdversarialTraining
from robustbench_lite.models import MLP
from tests.defenses.training_cases import (
    EPS,
    batch,
    digits,
    expect_resumable,
    linear,
    robust_accuracy,
    standard,
    streams,
    trained,
)

THREAT = Lp("linf", 0.1)


def small(**options: Any) -> EnsembleAdversarialTraining:
    surrogates = (partial(MLP, hidden=(8,)), partial(MLP, hidden=()))
    return EnsembleAdversarialTraining(FGSM(), THREAT, **{"surrogates": surrogates, "pretraining": 2} | options)


def set_up(**options: Any) -> nn.ModuleList:
    return small(**options).setup(linear(), digits("train", 400))


def test_sources_take_turns() -> None:
    """The loss at a step is that of adversarial training on the step's own source."""
    model, others, b = linear(), [linear(seed) for seed in (1, 2)], batch()
    objective = EnsembleAdversarialTraining(FGSM(), THREAT, surrogates=others, mix=0.25)
    state = nn.ModuleList(others)
    for index, source in enumerate([others[0], others[1], model, others[0]]):
        x = b.x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(source(x), b.y), x)
        x_adv = b.x + 0.1 * slope.sign()
        expected = 0.25 * F.cross_entropy(model(b.x), b.y) + 0.75 * F.cross_entropy(model(x_adv), b.y)
        loss = objective.loss(model, b, Step(index, 100, 0), state, streams(b))
        torch.testing.assert_close(loss, expected)
        grads = torch.autograd.grad(loss, tuple(model.parameters()))
        assert all(g.abs().sum() > 0 for g in grads)


def test_classes_are_built_for_the_data_and_trained_from_seeds_of_their_own() -> None:
    data = digits("train", 400)
    before = torch.get_rng_state()
    first = set_up(surrogates=(MLP, MLP), pretraining=10)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    again = set_up(surrogates=(MLP, MLP), pretraining=10)
    torch.set_rng_state(before)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad
    for net in first:
        assert not net.training
        assert (net(data.images).argmax(1) == data.labels).float().mean() > 0.8
    assert not torch.equal(next(first[0].parameters()), next(first[1].parameters()))


class Watched(MLP):
    """Keeps what it was trained on."""

    seen: ClassVar[list[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.append(x)
        return super().forward(x)


def test_a_class_learns_from_all_images_in_each_epoch_in_a_new_order() -> None:
    count, Watched.seen[:] = 400, []
    x = (torch.arange(count) / count).view(-1, 1, 1, 1).expand(-1, 1, 3, 3)
    data = Dataset("ramp", "train", x, torch.arange(count) % 3, torch.arange(count), 3)
    small(surrogates=(Watched,), pretraining=2).setup(linear(), data)
    first, second = torch.cat(Watched.seen)[:, 0, 0, 0].view(2, count)
    for order in (first, second):
        assert torch.equal(order.sort().values, x[:, 0, 0, 0])
        assert not torch.equal(order, x[:, 0, 0, 0])
    assert not torch.equal(first, second)


def test_nets_are_taken_as_they_are_and_left_alone() -> None:
    given = linear().train()
    (kept,) = set_up(surrogates=[given])
    assert kept is not given
    assert torch.equal(kept[1].weight, given[1].weight)
    assert given.training and all(p.requires_grad for p in given.parameters())


def test_it_withstands_what_transfers() -> None:
    """Examples of a net that took no part, at which the standard net is the worse one."""
    data = digits("test", 150)
    threat = Lp("linf", 0.2)
    other = set_up(surrogates=(partial(MLP, hidden=(48,)),), pretraining=20)[0]
    x_adv = PGD(steps=10)(other, data.images, data.labels, threat, stop="never").x_adv

    def accuracy(model: nn.Module) -> float:
        return float((model(x_adv).argmax(1) == data.labels).float().mean())

    objective = EnsembleAdversarialTraining(FGSM(), threat, surrogates=(MLP, partial(MLP, hidden=(32,))))
    assert accuracy(trained(objective)) > accuracy(standard()) + 0.15
    assert robust_accuracy(trained(EnsembleAdversarialTraining(FGSM(), Lp("linf", EPS), surrogates=(MLP,)))) > (
        robust_accuracy() + 0.1
    )


def test_a_killed_training_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_resumable(small(ramp=0.5), tmp_path, monkeypatch)


def no_net(num_classes: int) -> int:
    return num_classes


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, "at least one other net", lambda: small(surrogates=())),
        (TypeError, "a surrogate is a torch.nn.Module", lambda: small(surrogates=("digits/standard",))),
        (TypeError, "must make a torch.nn.Module", lambda: set_up(surrogates=(no_net,))),
        (ValueError, "number of epochs", lambda: small(pretraining=0)),
        (ValueError, "share of the clean loss", lambda: small(mix=-0.1)),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(error: type[Exception], message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message):
        make()
