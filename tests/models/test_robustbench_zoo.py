"""Nets of RobustBench's zoo, with a stand-in for its package: nothing is downloaded here."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from robustbench_lite.models.robustbench_zoo import load_robustbench


class Datasets(Enum):
    cifar_10 = "cifar10"


class Threats(Enum):
    Linf = "Linf"
    L2 = "L2"


class Payload:
    """Would run code if it were unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("the file was unpickled",))


@pytest.fixture
def utils(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`robustbench.utils` as release 1.1.1 has it: names by data set and threat; `load_model`, which talks."""
    module, package = ModuleType("robustbench.utils"), ModuleType("robustbench")

    def load_model(model_name: str, model_dir: Any, dataset: str, threat_model: str) -> nn.Module:
        print("Downloading")  # noqa: T201 - as the package does
        file = Path(model_dir) / dataset / threat_model / f"{model_name}.pt"
        net = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
        net.load_state_dict(torch.load(file, weights_only=False))  # timm asks for that
        return net.train()

    vars(module).update(load_model=load_model, all_models={Datasets.cifar_10: {Threats.Linf: {"Some2020Net": {}}}})
    stand_ins = {"robustbench": package, "robustbench.utils": module}
    stand_ins |= {name: ModuleType(name) for name in ("autoattack", "autoattack.state")}  # what it imports
    for name, part in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, part)
    (tmp_path / "cifar10" / "Linf").mkdir(parents=True)
    yield module
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_net_by_name(utils: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = nn.Sequential(nn.Flatten(), nn.Linear(12, 10)).state_dict()
    torch.save(state, tmp_path / "cifar10" / "Linf" / "Some2020Net.pt")
    net = load_robustbench("Some2020Net", dataset="cifar10", model_dir=tmp_path)
    assert not net.training
    assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())
    assert capsys.readouterr().out == ""  # where tables go


@pytest.mark.parametrize("asked", [None, "1"])
def test_what_is_downloaded_is_never_unpickled(
    utils: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None
) -> None:
    if asked:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", asked)
    file = tmp_path / "cifar10" / "Linf" / "Some2020Net.pt"
    for write in (torch.save, lambda payload, path: path.write_bytes(pickle.dumps(payload, protocol=2))):
        write(Payload(), file)
        with pytest.raises(ValueError, match="that code is never run"):
            load_robustbench("Some2020Net", dataset="cifar10", model_dir=tmp_path)
    assert os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD") == asked


def test_unknown_names(utils: ModuleType) -> None:
    for arguments, words in (
        (("Some2020Nett", "cifar10", "Linf"), "did you mean 'Some2020Net'"),
        (("Some2020Net", "digits", "Linf"), "has nets for cifar10, not for digits"),
        (("Some2020Net", "cifar10", "L1"), "there are: Linf"),
    ):
        with pytest.raises(ValueError, match=words):
            load_robustbench(arguments[0], dataset=arguments[1], threat_model=arguments[2])
    with pytest.raises(ValueError, match="do not know the 7 classes"):
        load_robustbench("Some2020Net", dataset="cifar10", num_classes=7)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "robustbench", None)
    with pytest.raises(ImportError, match=r"pip install 'robustbench_lite\[robustbench\]'"):
        load_robustbench("Carmon2019Unlabeled", dataset="cifar10")
