"""A folder to work in with a small net of a user's, and a zoo of two untrained entries."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from robustbench_lite import load_data
from robustbench_lite.app.main import main
from robustbench_lite.models import create_model
from robustbench_lite.zoo import cards, save_entry

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, hidden=6):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))

    def forward(self, x):
        return self.body(x)
"""

Rbl = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory: it holds users_net.py, and nothing imported from it outlives the test."""
    (tmp_path / "users_net.py").write_text(NET)
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


@pytest.fixture
def zoo(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's zoo is this folder for the time of a test: digits/a and digits/b."""
    root = tmp_path_factory.mktemp("zoo")
    monkeypatch.setattr(cards, "ROOT", root)
    data = load_data("digits").head(20)
    for seed, name in enumerate(("digits/a", "digits/b")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = {"name": "mlp", "hidden": [6], "image_size": 8}
            net = create_model("mlp", hidden=[6], image_size=8).eval()
        save_entry(
            name, net, description=f"nothing, seed {seed}", source="none", data=data, model=model,
            command="rbl train", seed=seed, epochs=0, hours=0, figures={}, root=root,
        )  # fmt: skip
    return root
