from __future__ import annotations

import struct
import urllib.error
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robustbench_lite.data import Dataset, load_data
from robustbench_lite.data.vision import data_folder

RNG = np.random.default_rng(0)


def write_idx(path: Path, array: np.ndarray) -> None:
    """MNIST's own file format: magic number, sizes, bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


def fake_mnist(root: Path, folder: str = "MNIST") -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for part, stem, n in (("train", "train", 60), ("test", "t10k", 8)):
        arrays[f"x_{part}"] = RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"y_{part}"] = (np.arange(n) % 10).astype(np.uint8)
        write_idx(root / folder / "raw" / f"{stem}-images-idx3-ubyte", arrays[f"x_{part}"])
        write_idx(root / folder / "raw" / f"{stem}-labels-idx1-ubyte", arrays[f"y_{part}"])
    return arrays


def same(a: Dataset, b: Dataset) -> bool:
    return a.content_hash == b.content_hash and torch.equal(a.indices, b.indices) and a.name == b.name


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_torchvisions_layout_and_an_archive_give_the_same(tmp_path: Path, name: str, folder: str) -> None:
    arrays = fake_mnist(tmp_path / "torchvision", folder)
    (tmp_path / "npz").mkdir()
    np.savez_compressed(tmp_path / "npz" / f"{name}.npz", **arrays)
    for split in ("train", "calibration", "test"):
        a = load_data(name, split, data_dir=tmp_path / "torchvision")
        b = load_data(name, split, data_dir=tmp_path / "npz")
        assert same(a, b)
        part = "test" if split == "test" else "train"
        assert np.array_equal((a.images[:, 0] * 255).round().numpy(), arrays[f"x_{part}"][a.indices])
        assert np.array_equal(a.labels.numpy(), arrays[f"y_{part}"][a.indices])
    train, calibration = (load_data(name, split, data_dir=tmp_path / "npz") for split in ("train", "calibration"))
    assert [*train.indices.tolist(), *calibration.indices.tolist()] == list(range(60))


class FakeCIFAR:
    """Stands in for torchvision's CIFAR and SVHN classes, whose files have fixed checksums."""

    def __init__(self, root: str, download: bool, train: bool | None = None, split: str | None = None) -> None:
        warnings.warn("align should be a boolean", np.exceptions.VisibleDeprecationWarning, stacklevel=2)
        self.asked = {"root": root, "download": download, "train": train, "split": split}
        n = 50 if train or split == "train" else 6
        last = np.random.default_rng(n).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        self.targets = [k % 10 for k in range(n)]
        self.labels = np.array(self.targets)
        self.data = last if split is None else last.transpose(0, 3, 1, 2)


@pytest.mark.parametrize(("name", "cls"), [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100"), ("svhn", "SVHN")])
def test_colour_images_come_channels_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, cls: str
) -> None:
    monkeypatch.setattr(f"torchvision.datasets.{cls}", FakeCIFAR)
    test = load_data(name, data_dir=tmp_path, download=True)
    expected = np.random.default_rng(6).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    assert np.array_equal((test.images * 255).round().numpy().transpose(0, 2, 3, 1), expected)
    assert test.num_classes == (100 if name == "cifar100" else 10)
    train, calibration = (load_data(name, s, data_dir=tmp_path, download=True) for s in ("train", "calibration"))
    assert [*train.indices.tolist(), *calibration.indices.tolist()] == list(range(50))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100", "svhn"])
def test_missing_data_says_how_to_get_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_data(name, data_dir=tmp_path)
    message = str(caught.value)
    for hint in (str(tmp_path), "download=True", "data.download=true", f"{name}", ".npz", "RBL_DATA"):
        assert hint in message


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), RuntimeError("Error downloading x")])
def test_a_failed_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("torchvision.datasets.MNIST", fail)
    with pytest.raises(ConnectionError, match="'mnist' could not be downloaded"):
        load_data("mnist", data_dir=tmp_path, download=True)


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(ValueError, match="damaged or not complete"):
        load_data("cifar10", data_dir=tmp_path)


def test_where_data_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RBL_DATA", raising=False)
    assert data_folder() == Path("data_cache")
    monkeypatch.setenv("RBL_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    assert data_folder("elsewhere") == Path("elsewhere")


def test_the_published_sets(shared_data: Path) -> None:
    for name, sizes in (("mnist", (55000, 5000, 10000)), ("cifar10", (18000, 2000, 10000))):
        parts = [load_data(name, split, data_dir=shared_data) for split in ("calibration", "test")]
        assert tuple(len(part) for part in parts) == sizes[1:]
        assert parts[0].indices[0] == sizes[0]
    assert load_data("mnist", data_dir=shared_data).labels[:5].tolist() == [7, 2, 1, 0, 4]
