"""Every config composes and builds what its group promises; every experiment's command composes."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from robustbench_lite.app import building, hydra_app
from robustbench_lite.app.listing import GROUPS
from robustbench_lite.attacks import Attack
from robustbench_lite.certify import Certifier
from robustbench_lite.core import registry
from robustbench_lite.core.threats import Threat
from robustbench_lite.data import Dataset
from robustbench_lite.defenses import Objective

WITH_A_PATH = {"npz": "data.path=x.npz", "image_folder": "data.path=x"}


@pytest.fixture(autouse=True)
def _hydra() -> Iterator[None]:
    hydra_app.register()
    with initialize_config_module("robustbench_lite.conf", version_base="1.3"):
        yield


def composed(command: str, *overrides: str) -> DictConfig:
    return compose(command, list(overrides), return_hydra_config=False)


def node(group: str, name: str) -> Any:
    return OmegaConf.to_container(composed("evaluate", f"+{group}@it={name}").it, resolve=True)


@pytest.mark.parametrize(
    ("group", "kind"), [("attack", Attack), ("certifier", Certifier), ("threat", Threat), ("defense", Objective)]
)
def test_methods_build(group: str, kind: type) -> None:
    names = registry.groups(group)
    assert names
    for name in names:
        assert isinstance(building.build(node(group, name), name), kind), name


@pytest.mark.parametrize("name", registry.groups("suite"))
def test_suites_build(name: str) -> None:
    plain = {"suite": OmegaConf.to_container(composed("evaluate", f"suite={name}").suite, resolve=True)}
    attacks, certifiers = building.methods(plain, "attacks"), building.methods(plain, "certifiers")
    assert all(isinstance(attack, Attack) for attack in attacks)
    assert all(isinstance(certifier, Certifier) for certifier in certifiers)
    assert attacks + certifiers
    judged = building.threats(plain | {"threat": node("threat", "linf") | {"eps": 0.1}})
    assert all(isinstance(threat, Threat) for threat in judged)
    assert all(any(method.supports(threat) for threat in judged) for method in attacks + certifiers)
    assert all(any(attack.supports(threat) for attack in attacks + certifiers) for threat in judged)


def test_a_suite_adds_threats_but_none_twice() -> None:
    plain = {"suite": OmegaConf.to_container(composed("evaluate", "suite=spatial").suite, resolve=True)}
    first = building.threats(plain | {"threat": node("threat", "linf") | {"eps": 0.1}})
    assert [threat.name[:8] for threat in first] == ["linf", "rotation", "deformat"]
    same = building.threats(plain | {"threat": node("threat", "deformation")})
    assert [threat.name[:8] for threat in same] == ["deformat", "rotation"]


@pytest.mark.parametrize("name", registry.groups("model"))
@pytest.mark.parametrize("shape", [(1, 28), (3, 32)])
def test_models_fit_the_data(name: str, shape: tuple[int, int]) -> None:
    if name in ("custom", "onnx", "robustbench"):
        pytest.skip("its net comes from outside")
    channels, size = shape
    images = torch.zeros(7, channels, size, size)
    data = Dataset("some", "test", images, torch.arange(7), torch.arange(7), num_classes=7)
    with torch.device("meta"):
        net = building.net(node("model", name), data)
        assert net.eval()(torch.zeros(1, channels, size, size)).shape == (1, 7)


@pytest.mark.parametrize("name", registry.groups("data"))
def test_data_composes_for_every_command(name: str) -> None:
    path = [WITH_A_PATH[name]] if name in WITH_A_PATH else []
    for command in ("evaluate", "train"):
        assert composed(command, f"data={name}", *path).data._target_


@pytest.mark.parametrize("threat", ["linf", "l2", "l1"])
def test_the_usual_budget_is_of_the_data_and_can_be_given(threat: str) -> None:
    digits, mnist = (
        composed("evaluate", f"data={data}", f"threat={threat}").threat.eps for data in ("digits", "mnist")
    )
    assert digits != mnist
    assert composed("evaluate", f"threat={threat}", "threat.eps=8/255").threat.eps == "8/255"


@pytest.mark.parametrize("name", registry.groups("experiment"))
def test_an_experiment_is_headed_by_its_command(name: str) -> None:
    if name == "attack_search":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    text = registry.groups("experiment")[name].read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("# rbl "))
    _, command, *arguments = shlex.split(line.removeprefix("# "))
    assert f"experiment={name}" in arguments
    first = [a.split(",")[0] for a in arguments if a != "--multirun" and not a.startswith("defense=")]
    config = composed(command, *first)
    assert building.build(OmegaConf.to_container(config.threat, resolve=True), "threat")


def test_zoo_entries_are_defenses_that_bring_their_data(zoo: object) -> None:
    hydra_app.register()
    config = composed("evaluate", "defense=digits/a", "data=digits")
    assert config.defense.name == "digits/a"
    assert composed("evaluate", "data=mnist", "defense=digits/a").data.name == "mnist"


def test_every_group_is_listed() -> None:
    from importlib.resources import files

    folders = {f.name for f in files("robustbench_lite.conf").iterdir() if f.is_dir() and not f.name.startswith("_")}
    assert folders == {group for group, _ in GROUPS.values()}
