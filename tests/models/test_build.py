from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from robustbench_lite.models import MLP, PreActResNet18, create_model, load_model, save_weights, shape_options

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width, num_classes=10):
        super().__init__()
        head = nn.Linear(width, num_classes)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Dropout(0.5), head)

    def forward(self, x):
        return self.layers(x)

def anything(**options):
    return Net(**options)

def none():
    return 3
"""


@pytest.fixture
def my_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_own_nets.py").write_text(NET)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_own_nets", raising=False)
    return "users_own_nets"


def test_models_by_name() -> None:
    model = create_model("mlp", in_channels=3, image_size=8, num_classes=4, hidden=[7])
    assert isinstance(model, MLP)
    assert model(torch.rand(2, 3, 8, 8)).shape == (2, 4)
    assert isinstance(create_model("preact_resnet18", image_size=8, width=2), PreActResNet18)  # takes any size


def test_the_global_generator_alone_decides_the_start() -> None:
    nets = []
    for _ in range(2):
        torch.manual_seed(3)
        nets.append(create_model("mlp"))
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_a_net_of_the_users_own(my_module: str, tmp_path: Path) -> None:
    model = load_model(f"{my_module}.Net", width=6)
    path = save_weights(model, tmp_path / "net.safetensors")
    again = load_model(f"{my_module}.anything", weights=path, width=6)
    assert model.training
    assert not again.training  # ready to be evaluated: Dropout is off
    x = torch.rand(2, 1, 4, 4)
    assert torch.equal(model.eval()(x), again(x))


def test_only_what_a_net_takes_of_the_data_is_handed_over(my_module: str) -> None:
    shape = {"in_channels": 3, "image_size": 8, "num_classes": 7}
    assert shape_options(f"{my_module}.Net", **shape) == {"num_classes": 7}
    assert shape_options("robustbench_lite.models.SmallCNN", **shape) == shape
    assert shape_options("robustbench_lite.models.PreActResNet18", **shape) == {"in_channels": 3, "num_classes": 7}


def test_unknown_names_and_arguments(my_module: str) -> None:
    with pytest.raises(ValueError, match="unknown model 'smal_cnn'; did you mean 'small_cnn'"):
        create_model("smal_cnn")
    with pytest.raises(TypeError, match="takes no depth; it takes: in_channels, image_size, hidden, num_classes"):
        create_model("mlp", depth=3)
    with pytest.raises(TypeError, match="Net takes no image_size; it takes: width, num_classes"):
        load_model(f"{my_module}.Net", width=3, image_size=8)
    with pytest.raises(ImportError, match="unknown name in users_own_nets 'Nte'; did you mean 'Net'"):
        load_model(f"{my_module}.Nte")
    with pytest.raises(ImportError, match=r"no module 'no_such_module'; is its folder on PYTHONPATH"):
        load_model("no_such_module.Net")
    with pytest.raises(TypeError, match=r"must give a torch\.nn\.Module, got int"):
        load_model(f"{my_module}.none")
    with pytest.raises(FileNotFoundError, match="no file of weights"):
        create_model("mlp", weights="gone.safetensors")


def test_any_module_of_torch() -> None:
    assert isinstance(load_model("torch.nn.Flatten"), nn.Flatten)
