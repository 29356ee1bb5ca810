from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.attacks.fgsm import FGSM
from robustbench_lite.attacks.pgd import PGD
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.spatial import RotationTranslation
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.defenses.adversarial_training import AdversarialTraining
from robustbench_lite.defenses.base import Batch, Step
from robustbench_lite.defenses.standard import StandardTraining
from robustbench_lite.training import train


@dataclass(frozen=True)
class Shift:
    """Stands for an attack: adds the threat's eps, and notes how it was called."""

    calls: list[SimpleNamespace] = field(default_factory=list)

    def supports(self, threat: Lp) -> bool:
        return True

    def __call__(self, model: nn.Module, x: Tensor, goal: Tensor, threat: Lp, **options: Any) -> SimpleNamespace:
        self.calls.append(SimpleNamespace(x=x, goal=goal, threat=threat, **options))
        return SimpleNamespace(x_adv=x + threat.eps)


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 3))


def batch(n: int = 8) -> Batch:
    x = torch.rand(n, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.arange(n) % 3, torch.arange(n) + 100)


def streams(seed: int = 0) -> Streams:
    return Streams.from_generator(torch.Generator().manual_seed(seed), batch().indices)


@pytest.mark.parametrize("mix", [0.0, 0.25, 0.5])
def test_mix_is_the_share_of_the_clean_loss(mix: float) -> None:
    attack, model, b = Shift(), linear(), batch()
    objective = AdversarialTraining(attack, Lp("linf", 0.2), mix=mix)
    loss = objective.loss(model, b, Step(0, 10, 0), None, streams())
    clean, adversarial = (F.cross_entropy(model(x), b.y) for x in (b.x, b.x + 0.2))
    torch.testing.assert_close(loss, mix * clean + (1 - mix) * adversarial)
    (call,) = attack.calls
    assert call.stop == "never"
    assert torch.equal(call.indices, b.indices)
    assert torch.equal(call.goal, b.y)


@pytest.mark.parametrize(("index", "eps"), [(0, None), (19, None), (20, None), (30, 0.05), (60, 0.2), (99, 0.2)])
def test_eps_rises_linearly_after_the_warm_up(index: int, eps: float | None) -> None:
    attack = Shift()
    objective = AdversarialTraining(attack, Lp("linf", "1/5"), warmup=0.2, ramp=0.4)
    objective.loss(linear(), batch(), Step(index, 100, 0), None, streams())
    assert [call.threat.eps for call in attack.calls] == ([] if eps is None else [pytest.approx(eps)])


def test_the_attack_draws_from_the_streams_of_the_step() -> None:
    def drawn(seed: int) -> int:
        attack = Shift()
        AdversarialTraining(attack, Lp("linf", 0.2)).loss(linear(), batch(), Step(0, 10, 0), None, streams(seed))
        return int(torch.randint(2**40, (), generator=attack.calls[0].generator))

    assert drawn(0) == drawn(0) != drawn(1)


def test_examples_are_made_in_eval_mode_and_learnt_from_in_train_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3)).train()
    modes: list[bool] = []
    model[1].register_forward_hook(lambda part, *_: modes.append(part.training))
    objective = AdversarialTraining(PGD(steps=3), Lp("linf", 0.2))
    objective.loss(model, batch(), Step(0, 10, 0), None, streams())
    assert modes[-1]
    assert not any(modes[:-1])
    assert len(modes) > 3
    assert model[1].num_batches_tracked == 1
    assert model.training


@pytest.mark.parametrize("threat", [Lp("linf", 0.1), Lp("l2", 0.5), Lp("l1", 1.0)], ids=lambda t: t.norm)
def test_examples_lie_in_the_threat_and_have_a_higher_loss(threat: Lp) -> None:
    model, b = linear(), batch()
    objective = AdversarialTraining(PGD(steps=10), threat)
    for share in (0.5, 1.0):
        x_adv = objective.examples(model, b, share, streams())
        within = replace(threat, eps=share * threat.eps)
        assert within.contains(x_adv, b.x).all()
        assert not x_adv.requires_grad
        losses = [F.cross_entropy(model(x), b.y, reduction="none") for x in (x_adv, b.x)]
        assert (losses[0] > losses[1]).all()


def test_it_raises_accuracy_under_attack() -> None:
    data, held_out, threat = (
        load_data("digits", "train").head(400),
        load_data("digits", "test").head(150),
        Lp("linf", 0.12),
    )

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def robust(model: nn.Module) -> float:
        broken = PGD(steps=10, loss="margin")(model, held_out.images, held_out.labels, threat).success
        return 1 - float(broken.float().mean())

    settings: dict[str, Any] = {"epochs": 15, "batch_size": 80, "learning_rate": 1e-2}
    standard = robust(train(net(), data, StandardTraining(), **settings))
    trained = robust(train(net(), data, AdversarialTraining(PGD(steps=4), threat, ramp=0.3), **settings))
    assert trained > standard + 0.2
    single = robust(train(net(), data, AdversarialTraining(FGSM(random_start=True), threat, mix=0.5), **settings))
    assert single > standard + 0.1


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("share of the clean loss", lambda: AdversarialTraining(PGD(), Lp("linf", 0.1), mix=1.0)),
        ("together <= 1", lambda: AdversarialTraining(PGD(), Lp("linf", 0.1), warmup=0.6, ramp=0.6)),
        ("whose eps is one number", lambda: AdversarialTraining(PGD(), Lp("linf", None))),
        ("whose eps is one number", lambda: AdversarialTraining(PGD(), Lp("linf", torch.tensor([0.1])))),
        ("use ramp=0", lambda: AdversarialTraining(PGD(), RotationTranslation(), ramp=0.5)),
        ("does not support", lambda: AdversarialTraining(PGD(), RotationTranslation())),
    ],
)
def test_bad_arguments_are_refused(message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        make()
