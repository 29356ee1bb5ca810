"""What every wrapper of the package must keep, whatever it defends with."""

from __future__ import annotations

import inspect
import re
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import robustbench_lite.defenses as defenses
from robustbench_lite.core.goals import Untargeted
from robustbench_lite.core.models import ABSTAIN, labels_of
from robustbench_lite.core.results import Certificate
from robustbench_lite.core.threats import Lp
from robustbench_lite.data.base import Dataset
from robustbench_lite.defenses import Wrapper
from robustbench_lite.evaluation.fingerprint import fingerprint
from robustbench_lite.zoo import load_defense, save_entry
from tests.defenses.contract_cases import CASES, bare, blobs, fitted

WRAPPERS = [
    name
    for name, value in vars(defenses).items()
    if isinstance(value, type) and issubclass(value, Wrapper) and not inspect.isabstract(value)
]
every_wrapper = pytest.mark.parametrize("name", sorted(CASES))
LEARNERS = sorted(name for name in CASES if getattr(defenses, name).fit is not Wrapper.fit)


@cache
def specimen(name: str) -> Wrapper:
    return fitted(name)


def seeded(work: object) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return work()  # type: ignore[operator, no-any-return]


def test_every_public_wrapper_has_a_specimen() -> None:
    assert set(WRAPPERS) == set(CASES)


@every_wrapper
def test_it_still_tells_the_classes_apart(name: str) -> None:
    data, defense = blobs(60, "test", seed=2), specimen(name)
    assert (seeded(lambda: defense.predict(data.images)) == data.labels).double().mean() > 0.7


@every_wrapper
def test_save_and_load_give_the_same_answers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustbench_lite.zoo.entries.load_data", lambda *_, **__: blobs())
    defense, x = specimen(name), blobs(10, "test", seed=2).images
    about = {"description": "d", "source": "s", "command": "c", "seed": 0, "epochs": 1, "hours": 0.0, "figures": {}}
    save_entry("blobs/mine", defense, data=blobs(), model=CASES[name].model, root=tmp_path, **about)  # type: ignore[arg-type]
    loaded = load_defense("blobs/mine", root=tmp_path)
    assert type(loaded) is type(defense)
    assert isinstance(loaded, Wrapper)
    assert loaded.settings() == defense.settings()
    assert torch.equal(seeded(lambda: loaded(x)), seeded(lambda: defense(x)))
    assert torch.equal(seeded(lambda: loaded.predict(x)), seeded(lambda: defense.predict(x)))


@every_wrapper
def test_answering_leaves_no_trace(name: str) -> None:
    defense, x = deepcopy(specimen(name)), blobs(4, "test", seed=2).images
    before = fingerprint(defense)
    seeded(lambda: (defense(x), defense.predict(x)))
    assert fingerprint(defense) == before


@every_wrapper
def test_predict_agrees_with_forward_where_it_does_not_abstain(name: str) -> None:
    defense, x = specimen(name), blobs(60, "test", seed=2).images
    labels, largest = seeded(lambda: defense.predict(x)), labels_of(seeded(lambda: defense(x)))
    answered = labels != ABSTAIN
    assert answered.double().mean() > 0.5
    agrees = (labels == largest)[answered].double().mean()
    if getattr(defense, "draws", 1) > 1:
        assert agrees > 0.9  # hard votes and soft ones, of other draws: the same class where it is clear
    else:
        assert agrees == 1


@every_wrapper
def test_it_is_as_stochastic_as_it_says(name: str) -> None:
    defense, x = specimen(name), blobs(30, "test", seed=2).images
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = defense(x), defense(x)
    assert torch.equal(first, second) != defense.stochastic


@every_wrapper
def test_the_other_images_of_the_batch_change_nothing(name: str) -> None:
    defense, x = specimen(name), blobs(8, "test", seed=2).images
    among = [torch.cat([x[:4], others]) for others in (x[4:], 1 - x[4:])]
    first, second = (seeded(lambda batch=batch: defense(batch))[:4] for batch in among)  # type: ignore[misc]
    assert torch.allclose(first, second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(name for name in CASES if not getattr(defenses, name).stochastic))
def test_the_batch_changes_nothing(name: str) -> None:
    defense, x = specimen(name), blobs(8, "test", seed=2).images
    alone = torch.cat([defense(image[None]) for image in x])
    assert torch.allclose(defense(x), alone, rtol=1e-4, atol=1e-4)


@every_wrapper
def test_a_knowing_attacker_gets_a_gradient(name: str) -> None:
    defense, data = specimen(name), blobs(12, "test", seed=2)
    view, x = defense.attack_view(8), data.images.clone().requires_grad_()
    logits = seeded(lambda: view(x))
    assert logits.shape == (12, 3)
    loss = nn.functional.cross_entropy(logits, data.labels, reduction="sum")
    slope = torch.autograd.grad(loss, x)[0]
    assert slope.isfinite().all()
    assert (slope.flatten(1).abs().amax(dim=1) > 0).double().mean() > 0.9


@every_wrapper
@pytest.mark.parametrize("threat", [Lp("linf", 0.3), Lp("l2", 1.0), Lp("l2", 1.5)], ids=["linf", "l2", "far_l2"])
def test_its_own_attacks_stay_in_the_threat_and_tell_the_truth(name: str, threat: Lp) -> None:
    defense, data = specimen(name), blobs(4, "test", seed=2)
    goal = Untargeted(data.labels)
    for attack in defense.adaptive_attacks(threat):
        assert attack.supports(threat)
        found = attack(defense, data.images, data.labels, threat, view=defense.attack_view(8), max_queries=2000)
        assert threat.contains(found.x_adv, data.images).all()
        assert (found.forwards <= 2000).all()
        fooled = seeded(lambda found=found: share(goal, defense, found.x_adv, 100 if defense.stochastic else 1))  # type: ignore[misc]
        if defense.stochastic:  # most of 80 answers were wrong once: it is no lie if a quarter still are
            assert (fooled[found.success] > 0.25).all()
        else:
            assert torch.equal(found.success, fooled == 1)


def share(goal: Untargeted, defense: Wrapper, x: torch.Tensor, draws: int) -> torch.Tensor:
    """How often the deployed answer about each image is what an attack wants, (B,)."""
    return sum(goal.achieved(defense.predict(x), defense.rejects).double() for _ in range(draws)) / draws


@every_wrapper
def test_its_own_certifiers_certify_it(name: str) -> None:
    defense, data = specimen(name), blobs(4, "test", seed=2)
    for certifier in defense.certifiers():
        norm = next(norm for norm in ("l2", "linf", "l1", "l0") if certifier.supports(Lp(norm, 1)))
        threat = Lp(norm, 1 if norm == "l0" else 0.01)
        found = certifier(defense, data.images, data.labels, threat)
        assert isinstance(found, Certificate)
        assert not certifier.smooths


@every_wrapper
@pytest.mark.parametrize("ask", ["__call__", "predict"])
def test_images_of_another_shape_are_named(name: str, ask: str) -> None:
    answer = getattr(specimen(name), ask)
    with pytest.raises((ValueError, RuntimeError), match=re.escape("(2, 3, 5, 5)")):
        answer(torch.rand(2, 3, 5, 5))
    for shape in ((1, 6, 6), (36,), (2, 1, 1, 6, 6)):
        with pytest.raises(ValueError, match=re.escape("(B, C, H, W), got " + str(shape))):
            answer(torch.rand(shape))


@every_wrapper
@pytest.mark.parametrize("ask", ["__call__", "predict"])
def test_a_single_class_is_refused(name: str, ask: str) -> None:
    train, held_out = (one_class(120, "train"), one_class(90, "calibration"))
    with pytest.raises(ValueError, match="2 classes"):  # when it is made, fitted or asked
        defense = bare(name, num_classes=1)
        defense.fit(train, held_out)
        getattr(defense, ask)(train.images[:2])


def one_class(n: int, split: str) -> Dataset:
    data = blobs(n, split)
    return Dataset("one", split, data.images, torch.zeros_like(data.labels), data.indices, 1)


@pytest.mark.parametrize("name", LEARNERS)
def test_what_must_be_fitted_says_so(name: str) -> None:
    defense = bare(name)
    for ask in (defense, defense.predict, defense.attack_view(8)):
        with pytest.raises(ValueError, match="fit"):
            ask(blobs(4).images)


@pytest.mark.parametrize("name", sorted(name for name, case in CASES.items() if case.calibrated))
def test_what_must_be_calibrated_says_so(name: str) -> None:
    with pytest.raises(ValueError, match="calibration"):
        bare(name).fit(blobs(), None)


@pytest.mark.parametrize("name", sorted(name for name, case in CASES.items() if case.few is not None))
def test_too_few_calibration_samples_are_refused_and_one_more_is_enough(name: str) -> None:
    few = CASES[name].few or 1
    with pytest.raises(ValueError, match=f"calibration samples.*got {few}"):
        bare(name).fit(blobs(), blobs(few, "calibration", seed=1))
    defense = bare(name)
    defense.fit(blobs(), blobs(few + 1, "calibration", seed=1))
    assert defense.predict(blobs(4).images).shape == (4,)


@pytest.mark.gpu
@every_wrapper
def test_a_gpu_gives_the_answers_of_the_cpu(name: str) -> None:
    defense, data = specimen(name), blobs(30, "test", seed=2)
    moved, x = deepcopy(defense).to("cuda"), data.images.to("cuda")
    found = probabilities(moved, x)
    assert found.device == x.device
    away = (found.cpu() - probabilities(defense, data.images)).abs().amax(dim=1)
    close = 0.2 if defense.stochastic else 1e-3  # the mean of 200 draws has a deviation of 0.035
    assert (away < close).double().mean() > 0.9  # a neighbour, or a grey level, may be another by rounding
    labels = moved.predict(x)
    assert labels.device == x.device
    assert (labels.cpu() == data.labels).double().mean() > 0.7
    leaf = x.clone().requires_grad_()
    slope = torch.autograd.grad(moved.attack_view(8)(leaf).square().sum(), leaf)[0]
    assert slope.device == x.device
    assert slope.isfinite().all()


def probabilities(defense: Wrapper, x: torch.Tensor) -> torch.Tensor:
    """Mean softmax (B, K) over enough draws."""
    draws = 200 if defense.stochastic else 1
    return seeded(lambda: sum(defense(x).detach().softmax(dim=1) for _ in range(draws)) / draws)
