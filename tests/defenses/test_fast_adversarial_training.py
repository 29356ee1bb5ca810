from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.attacks.fgsm import FGSM
from robustbench_lite.attacks.pgd import PGD
from robustbench_lite.core.models import predict
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.spatial import RotationTranslation
from robustbench_lite.core.threats import Lp
from robustbench_lite.defenses.adversarial_training import AdversarialTraining
from robustbench_lite.defenses.base import Batch, Step
from robustbench_lite.defenses.fast_adversarial_training import FastAdversarialTraining
from tests.defenses.training_cases import (
    EPS,
    batch,
    digits,
    expect_resumable,
    linear,
    robust_accuracy,
    standard,
    trained,
)

THREAT = Lp("linf", EPS)


def fast(**options: Any) -> FastAdversarialTraining:
    return FastAdversarialTraining(FGSM(random_start=True), THREAT, **{"held_aside": 50, "drop": 0.2} | options)


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def part(rows: Tensor) -> tuple[Batch, Streams]:
    data = digits("train", 400)
    b = Batch(data.images[rows], data.labels[rows], data.indices[rows])
    return b, Streams.from_generator(torch.Generator().manual_seed(0), b.indices)


def test_fgsm_from_a_random_start_is_one_pgd_step_of_a_quarter_more_than_eps() -> None:
    """Of two classes a linear net has one direction; a point of the ball that goes 1.25 eps along it mostly leaves."""
    b, model = batch(200, classes=2), linear(classes=2)
    weight = model[1].weight.detach()
    uphill = ((1 - 2 * b.y)[:, None] * (weight[1] - weight[0])).sign().view(-1, 1, 3, 3)
    for attack in (FGSM(random_start=True), PGD(steps=1, step_size=1.25 * EPS)):
        found = attack(model, b.x, b.y, THREAT, stop="never").x_adv
        moved = (found - b.x) * uphill / EPS
        assert moved.max() <= 1 + 1e-5
        assert moved.min() >= 0.25 - 1e-5  # from -eps at the worst
        assert abs(float((moved > 0.999).float().mean()) - 5 / 8) < 0.05  # those that started above -eps / 4


def test_samples_held_aside_are_never_learnt_from() -> None:
    model, data = net(), digits("train", 400)
    objective = fast()
    state = objective.setup(model, data)
    aside = set(state.probe.indices.tolist())
    assert len(aside) == 50 and aside <= set(data.indices.tolist())
    assert max(torch.bincount(state.probe.y)) < 15  # of all classes
    x, learnt = [], []
    model.register_forward_hook(lambda part, inputs, _: x.append(inputs[0]) if part.training else None)
    for rows in torch.arange(400).split(80):
        b, own = part(rows)
        objective.update(model, b, Step(0, 10, 0), state, own, lambda v: learnt.append(float(v.detach())))
        kept = [i for i, name in enumerate(b.indices.tolist()) if name not in aside]
        assert len(x[-1]) == len(kept) < 80
        near = (x[-1] - b.x[kept]).abs().flatten(1).amax(1)
        assert (near <= EPS + 1e-6).all()
    b, own = part(torch.tensor([data.indices.tolist().index(name) for name in aside]))
    assert float(objective.update(model, b, Step(0, 10, 0), state, own, lambda v: learnt.append(0.0))) == 0
    assert len(learnt) == 5  # of nothing, nothing is learnt


def look(objective: FastAdversarialTraining, model: nn.Module, state: Any, epoch: int) -> None:
    b, own = part(torch.arange(8))
    objective.update(model, b, Step(epoch * 5, 1000, epoch), state, own, lambda _: None)


def test_it_looks_once_before_each_epoch_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    monkeypatch.setattr(FastAdversarialTraining, "accuracy", lambda *_: looks.append(1) or 0.5)
    model, objective = net(), fast()
    state = objective.setup(model, digits("train", 400))
    seen = []
    for epoch in (0, 0, 1, 1, 2, 2):
        look(objective, model, state, epoch)
        seen.append(len(looks))
    assert seen == [0, 0, 1, 1, 2, 2]


def test_a_checkpoint_holds_the_best_weights_and_when_they_were() -> None:
    model, objective, data = net(), fast(), digits("train", 400)
    state = objective.setup(model, data)
    state.keep(net(1), 0.7, 3)
    state.looked.fill_(5)
    resumed = objective.setup(model, data)
    resumed.load_state_dict(state.state_dict())
    assert (float(resumed.accuracy), int(resumed.epoch), int(resumed.looked)) == (0.7, 3, 5)
    assert torch.equal(resumed.best[1].weight, net(1)[1].weight)
    assert not any(parameter.requires_grad for parameter in resumed.parameters())


def test_of_weights_that_hold_as_well_the_later_ones_are_kept() -> None:
    state = fast().setup(net(), digits("train", 400))
    for seed, accuracy in enumerate([0.5, 0.7, 0.7, 0.6]):
        state.keep(net(seed), accuracy, seed)
    assert (float(state.accuracy), int(state.epoch)) == (0.7, 2)
    assert torch.equal(state.best[1].weight, net(2)[1].weight)


def test_the_best_weights_come_back_after_a_collapse(caplog: pytest.LogCaptureFixture) -> None:
    good, bad, objective, data = (
        trained(AdversarialTraining(PGD(steps=4), THREAT)),
        standard(),
        fast(),
        digits("train", 400),
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    state = objective.setup(model, data)
    for epoch, weights in enumerate([model, good, bad, bad], start=1):
        model.load_state_dict(weights.state_dict())
        look(objective, model, state, epoch)
    assert int(state.epoch) == 2
    expected = PGD(steps=10)(good, state.probe.x, state.probe.y, THREAT, indices=state.probe.indices).success
    assert float(state.accuracy) == pytest.approx(1 - float(expected.double().mean()))
    with caplog.at_level(logging.WARNING):
        deployed = objective.finish(model.eval(), data, state)
    assert "catastrophic overfitting" in caplog.text and "after epoch 2" in caplog.text
    assert all(torch.equal(tensor, good.state_dict()[key]) for key, tensor in deployed.state_dict().items())


def test_a_net_that_holds_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    good, bad, objective, data = (
        trained(AdversarialTraining(PGD(steps=4), THREAT)),
        standard(),
        fast(),
        digits("train", 400),
    )
    state = objective.setup(good, data)
    look(objective, bad, state, 1)
    with caplog.at_level(logging.WARNING):
        assert objective.finish(good, data, state) is good
        tolerant = fast(drop=1.0)
        look(tolerant, good, state, 2)
        before = {key: tensor.clone() for key, tensor in bad.state_dict().items()}
        tolerant.finish(bad, data, state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in bad.state_dict().items())
    assert not caplog.records


def test_it_raises_accuracy_under_attack() -> None:
    model = trained(fast(ramp=0.3))
    assert robust_accuracy(model) > robust_accuracy() + 0.1
    data = digits("test", 150)
    assert (predict(model, data.images) == data.labels).float().mean() > 0.85


def test_a_killed_training_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_resumable(fast(held_aside=10, drop=0.0), tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("held_aside is a number", lambda: fast(held_aside=0)),
        ("drop is a fall", lambda: fast(drop=-0.1)),
        ("share of the clean loss", lambda: fast(mix=1.0)),
        ("leaves nothing of 400 samples", lambda: fast(held_aside=400).setup(net(), digits("train", 400))),
        ("does not support", lambda: FastAdversarialTraining(PGD(), RotationTranslation(), check=PGD())),
    ],
)
def test_bad_arguments_are_refused(message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        make()
