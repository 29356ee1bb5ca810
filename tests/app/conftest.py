"""A folder to work in with a small net of a user's, and a zoo of two."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from robustbench_lite import load_data
from robustbench_lite.app.main import main
from robustbench_lite.models import create_model
from robustbench_lite.zoo import cards, save_entry

NET = """
from torch import nn


class Net(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.scale = scale

    def forward(self, x):
        return self.scale * self.linear(x.flatten(1))
"""

Rbl = Callable[..., tuple[int, str, str]]


@cache
def nearest_mean(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the linear classifier that chooses the nearest class mean of the first training images."""
    data = load_data("digits", "train").head(samples)
    flat = data.images.flatten(1)
    means = torch.stack([flat[data.labels == k].mean(0) for k in range(10)])
    return 2 * means, -means.square().sum(1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory: it holds users_net.py with its weights, and nothing imported from it outlives the test."""
    (tmp_path / "users_net.py").write_text(NET)
    weight, bias = nearest_mean(500)
    save_file({"linear.weight": weight, "linear.bias": bias}, tmp_path / "net.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("RBL_DATA", raising=False)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def rbl(folder: Path, capsys: pytest.CaptureFixture[str]) -> Rbl:
    """Run `rbl` in this process: status, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(arguments)
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture(scope="session")
def small_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo of two entries: digits/a and digits/b."""
    root = tmp_path_factory.mktemp("zoo")
    data = load_data("digits").head(20)
    for samples, name in ((1000, "digits/a"), (60, "digits/b")):
        model = {"name": "mlp", "hidden": [], "image_size": 8}
        net = create_model("mlp", hidden=[], image_size=8).eval()
        with torch.no_grad():
            for parameter, value in zip(net.parameters(), nearest_mean(samples), strict=True):
                parameter.copy_(value)
        save_entry(
            name, net, description=f"the nearest of ten means over {samples} images", source="none", data=data,
            model=model, command="rbl train", seed=0, epochs=0, hours=0, figures={}, root=root,
        )  # fmt: skip
    return root


@pytest.fixture
def zoo(small_zoo: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's zoo is a copy of the small one for the time of a test."""
    root = tmp_path_factory.mktemp("copy") / "zoo"
    shutil.copytree(small_zoo, root)
    monkeypatch.setattr(cards, "ROOT", root)
    return root
