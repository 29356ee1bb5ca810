from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import get_class
from torch import nn

from robustbench_lite.core.models import is_stochastic, predict
from robustbench_lite.data import load_data
from robustbench_lite.data.base import Dataset
from robustbench_lite.defenses import Wrapper
from robustbench_lite.models import MLP, create_model
from robustbench_lite.zoo import card, load_defense, names, save_entry

MODEL = {"name": "mlp", "in_channels": 1, "image_size": 8, "num_classes": 10}


def data() -> Dataset:
    return Dataset("digits", "train", torch.rand(12, 1, 8, 8), torch.arange(12) % 10, torch.arange(12), 10)


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        arguments = dict(MODEL)
        return create_model(arguments.pop("name"), **arguments)


def save(root: Path, name: str = "digits/standard", **other: Any) -> Path:
    about: dict[str, Any] = {
        "description": "cross-entropy on clean images",
        "source": "none",
        "data": data(),
        "model": MODEL,
        "command": "rbl train data=digits defense=standard zoo=digits/standard",
        "seed": 0,
        "epochs": 20,
        "hours": 0.01,
        "figures": {"clean": {"accuracy": 0.97, "command": "rbl evaluate zoo=digits/standard"}},
    }
    return save_entry(name, other.pop("defense", net()), root=root, **(about | other))


def change_card(folder: Path, **changes: Any) -> None:
    path = folder / "card.yaml"
    about = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(about | changes))


def test_a_saved_defense_comes_back_exactly(tmp_path: Path) -> None:
    save(tmp_path)
    original, loaded = net(), load_defense("digits/standard", root=str(tmp_path))
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in original.state_dict().items())
    x = data().images
    assert torch.equal(loaded(x), original.eval()(x))
    assert not any(part.training for part in loaded.modules())
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_model_is_named_by_its_class_as_well(tmp_path: Path) -> None:
    target = {"_target_": "robustbench_lite.models.MLP", "in_channels": 1, "image_size": 8, "hidden": [5]}
    original = MLP(hidden=[5], image_size=8)
    save(tmp_path, defense=original, model=target)
    x = data().images
    assert torch.equal(load_defense("digits/standard", root=tmp_path)(x), original(x))
    with pytest.raises(ValueError, match="needs _target_"):
        save(tmp_path, defense=original, model={"hidden": [5]})


def test_the_card_says_how_the_entry_came_about(tmp_path: Path) -> None:
    folder = save(tmp_path)
    about = card("digits/standard", root=tmp_path)
    assert about["data"] == {
        "name": "digits",
        "split": "train",
        "samples": 12,
        "content_hash": about["data"]["content_hash"],
    }
    assert about["model"] == MODEL
    assert about["license"] == "MIT"
    assert about["command"].startswith("rbl train ")
    assert str(torch.__version__).startswith(about["versions"]["torch"])
    written = (folder / "weights.safetensors").read_bytes()
    assert about["weights"] == {"sha256": hashlib.sha256(written).hexdigest(), "bytes": len(written)}
    assert sorted(path.name for path in folder.iterdir()) == ["card.yaml", "weights.safetensors"]


def test_names_are_sorted_and_by_data(tmp_path: Path) -> None:
    for name in ("mnist/ibp_0.3", "digits/standard", "mnist/ibp_0.1"):
        save(tmp_path, name)
    assert names(root=tmp_path) == ["digits/standard", "mnist/ibp_0.1", "mnist/ibp_0.3"]
    assert names("mnist", root=tmp_path) == ["mnist/ibp_0.1", "mnist/ibp_0.3"]
    assert names("cifar10", root=tmp_path) == []
    with pytest.raises(ValueError, match=r"unknown zoo entry 'mnist/ibp_03'; did you mean 'mnist/ibp_0\.3'"):
        load_defense("mnist/ibp_03", root=tmp_path)
    with pytest.raises(ValueError, match="unknown zoo entry"):
        card("../digits/standard", root=tmp_path / "mnist")


@pytest.mark.parametrize(
    "change", [lambda b: b[:-1], lambda b: b[:-4] + b"\0\0\0\1", lambda b: b + b"\0", lambda b: b""]
)
def test_changed_weights_are_refused(change: Any, tmp_path: Path) -> None:
    path = save(tmp_path) / "weights.safetensors"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match="is not the file of its card"):
        load_defense("digits/standard", root=tmp_path)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    folder = save(tmp_path)
    path = folder / "weights.safetensors"
    torch.save(net().state_dict(), path)
    change_card(folder, weights={"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": 0})
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_defense("digits/standard", root=tmp_path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    (save(tmp_path) / "weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="retrain with: rbl train"):
        load_defense("digits/standard", root=tmp_path)


def test_broken_cards_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path)
    change_card(folder, model=MODEL | {"num_classes": 7})
    with pytest.raises(ValueError, match="does not fit the weights"):
        load_defense("digits/standard", root=tmp_path)
    change_card(folder, model=MODEL, wrapper={"_target_": "later.Wrapper"})
    with pytest.raises(ValueError, match="cannot rebuild the wrapper"):
        load_defense("digits/standard", root=tmp_path)
    (folder / "card.yaml").write_text("name: digits/standard\n")
    with pytest.raises(ValueError, match="lacks defense, source"):
        card("digits/standard", root=tmp_path)
    (folder / "card.yaml").write_text("name: [")
    with pytest.raises(ValueError, match="is not valid YAML"):
        card("digits/standard", root=tmp_path)


@pytest.mark.parametrize("name", ["standard", "digits/", "Digits/Standard", "../digits/x", "a/b/c", "digits/.."])
def test_bad_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a zoo name is <data>/<name>"):
        save(tmp_path, name)


def test_what_cannot_be_loaded_again_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="over the zoo's 1000000"):
        save(tmp_path, defense=nn.Linear(600, 600))
    with pytest.raises(ValueError, match="does not fit the weights"):
        save(tmp_path, model=MODEL | {"num_classes": 7})
    assert names(root=tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_listing_the_zoo_does_not_import_torch() -> None:
    code = "import sys; from robustbench_lite.zoo import card, names; [card(n) for n in names()]; "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=True)


@pytest.mark.parametrize("name", names())
def test_every_shipped_entry_loads(name: str, request: pytest.FixtureRequest) -> None:
    about = card(name)
    assert about["name"] == name
    assert name.startswith(f"{about['data']['name']}/")
    remembers = about["wrapper"] is not None and get_class(about["wrapper"]["_target_"]).needs_data
    elsewhere = remembers and about["data"]["name"] != "digits"
    assert not load_defense(name, data_dir=request.getfixturevalue("shared_data") if elsewhere else None).training


@pytest.mark.slow
@pytest.mark.parametrize("name", names("digits"))
def test_every_digits_entry_is_as_accurate_as_its_card_says(name: str) -> None:
    defense, data = load_defense(name), load_data("digits")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        right = float((predict(defense, data.images) == data.labels).double().mean())
    noise = 0.03 if is_stochastic(defense) else 0.004  # another machine's rounding may turn a sample or two
    assert right == pytest.approx(card(name)["figures"]["clean"]["accuracy"], abs=noise)


def test_the_zoo_knows_no_other_names() -> None:
    import robustbench_lite.zoo as zoo

    with pytest.raises(AttributeError, match="has no attribute 'load'"):
        zoo.load  # noqa: B018


class Remembering(Wrapper):
    """A net shifted by the mean of the training images, which its weights file does not hold."""

    needs_data = True

    def __init__(self, net: nn.Module, strength: float = 1.0) -> None:
        super().__init__()
        self.net, self.strength = net, strength
        self.mean = torch.tensor(torch.nan)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.net(x - self.strength * self.mean)
        return answer

    def restore(self, data: Any) -> None:
        self.mean = data.images.mean()


def test_a_wrapper_comes_back_with_its_settings_and_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = data()
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        "robustbench_lite.zoo.entries.load_data", lambda name, **given: asked.update(given, name=name) or samples
    )
    defense = Remembering(net(), strength=0.5).eval()
    defense.restore(samples)
    save(tmp_path, "digits/mine", defense=defense, data=samples)
    loaded = load_defense("digits/mine", root=tmp_path, data_dir="somewhere")
    assert isinstance(loaded, Remembering)
    assert loaded.strength == 0.5
    assert asked == {"name": "digits", "split": "train", "data_dir": "somewhere"}
    assert torch.equal(loaded(samples.images), defense(samples.images))

    other = Dataset("digits", "train", torch.rand(12, 1, 8, 8), samples.labels, samples.indices, 10)
    monkeypatch.setattr("robustbench_lite.zoo.entries.load_data", lambda name, **given: other)
    with pytest.raises(ValueError, match="content hash"):
        load_defense("digits/mine", root=tmp_path)
