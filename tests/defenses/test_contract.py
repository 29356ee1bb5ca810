"""What every wrapper of the package must keep, whatever it defends with."""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import robustbench_lite.defenses as defenses
from robustbench_lite.core.models import ABSTAIN, labels_of
from robustbench_lite.core.results import Certificate
from robustbench_lite.core.threats import Lp
from robustbench_lite.defenses import Wrapper
from robustbench_lite.zoo import load_defense, save_entry
from tests.defenses.contract_cases import CASES, blobs, fitted

WRAPPERS = [
    name
    for name, value in vars(defenses).items()
    if isinstance(value, type) and issubclass(value, Wrapper) and not inspect.isabstract(value)
]
every_wrapper = pytest.mark.parametrize("name", sorted(CASES))


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
def test_predict_agrees_with_forward_where_it_does_not_abstain(name: str) -> None:
    defense, x = specimen(name), blobs(60, "test", seed=2).images
    if defense.stochastic:
        return  # two calls are two draws
    labels = defense.predict(x)
    answered = labels != ABSTAIN
    assert answered.any()
    assert torch.equal(labels[answered], labels_of(defense(x))[answered])


@every_wrapper
def test_it_is_as_stochastic_as_it_says(name: str) -> None:
    defense, x = specimen(name), blobs(30, "test", seed=2).images
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = defense(x), defense(x)
    assert torch.equal(first, second) != defense.stochastic


@every_wrapper
def test_the_batch_changes_nothing(name: str) -> None:
    defense, x = specimen(name), blobs(8, "test", seed=2).images
    if defense.stochastic:
        return
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
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_its_own_attacks_stay_in_the_threat_and_tell_the_truth(name: str, norm: str) -> None:
    defense, data = specimen(name), blobs(4, "test", seed=2)
    threat = Lp(norm, 0.3 if norm == "linf" else 1.0)
    for attack in defense.adaptive_attacks(threat):
        assert attack.supports(threat)
        found = attack(defense, data.images, data.labels, threat, view=defense.attack_view(8), max_queries=2000)
        assert threat.contains(found.x_adv, data.images).all()
        assert (found.forwards <= 2000).all()


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
def test_images_of_another_shape_are_refused(name: str) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        specimen(name)(torch.rand(2, 3, 5, 5))


@pytest.mark.parametrize("name", sorted(name for name, case in CASES.items() if case.calibrated))
def test_what_must_be_fitted_says_so(name: str) -> None:
    from robustbench_lite.zoo.entries import _build

    bare = CASES[name].make(_build(CASES[name].model)).eval()
    with pytest.raises(ValueError, match="fit"):
        bare.predict(blobs(4).images)
    with pytest.raises(ValueError, match="calibration"):
        bare.fit(blobs(), None)


@pytest.mark.parametrize("name", sorted(name for name, case in CASES.items() if case.few is not None))
def test_too_few_calibration_samples_are_refused(name: str) -> None:
    from robustbench_lite.zoo.entries import _build

    bare = CASES[name].make(_build(CASES[name].model)).eval()
    with pytest.raises(ValueError, match="calibration samples"):
        bare.fit(blobs(), blobs(CASES[name].few or 1, "calibration", seed=1))
