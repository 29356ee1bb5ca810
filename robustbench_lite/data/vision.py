"""The classics through torchvision: MNIST, Fashion-MNIST, CIFAR-10, CIFAR-100, SVHN; or from `.npz` files at hand."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robustbench_lite.core.errors import lookup
from robustbench_lite.data.arrays import dataset
from robustbench_lite.data.base import Dataset
from robustbench_lite.data.npz_file import read_npz
from robustbench_lite.data.splits import check_split, tail

__all__ = ["data_folder", "vision"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Source:
    """Where one data set lies inside `data_dir`.

    Attributes:
        torchvision: its class there.
        layout: what of torchvision's own layout must be there for the data to count as present (test, train).
        npz: the `.npz` file of the test images and that of the training images.
        num_classes: number of classes.
        calibration: how many of the last training images of the `.npz` file are the calibration split.
    """

    torchvision: str
    layout: tuple[str, str]
    npz: tuple[str, str]
    num_classes: int = 10
    calibration: int = 5000

    def file(self, part: str) -> str:
        """Return the name of the `.npz` file of a part, "train" or "test"."""
        return self.npz[part == "train"]

    def is_there(self, folder: Path, part: str) -> bool:
        """Say whether torchvision's layout of a part, "train" or "test", is in the folder."""
        return (folder / self.layout[part == "train"]).exists()


def _folder_and_file(torchvision: str, folder: str, stem: str, num_classes: int = 10) -> Source:
    return Source(torchvision, (folder, folder), (f"{stem}.npz", f"{stem}.npz"), num_classes)


SOURCES = {
    "mnist": _folder_and_file("MNIST", "MNIST/raw", "mnist"),
    "fashion_mnist": _folder_and_file("FashionMNIST", "FashionMNIST/raw", "fashion_mnist"),
    "cifar10": Source(
        "CIFAR10", ("cifar-10-batches-py",) * 2, ("cifar10_test.npz", "cifar10_train_20k.npz"), calibration=2000
    ),
    "cifar100": _folder_and_file("CIFAR100", "cifar-100-python", "cifar100", 100),
    "svhn": Source("SVHN", ("test_32x32.mat", "train_32x32.mat"), ("svhn.npz", "svhn.npz")),
}


def vision(name: str, split: str = "test", *, data_dir: str | Path | None = None, download: bool = False) -> Dataset:
    """Return a split of MNIST, Fashion-MNIST, CIFAR-10, CIFAR-100 or SVHN, as published: uint8 divided by 255.

    "test" is the published test set. "calibration" is the last 5,000 published training images, whose order is random;
    "train" is the rest. `indices` are the positions in the published test or training set. SVHN's "extra" images are
    not used.

    `data_dir` may hold torchvision's own layout, which goes first, or `.npz` files with x_train, y_train, x_test,
    y_test (uint8): `mnist.npz`, `fashion_mnist.npz`, `cifar100.npz`, `svhn.npz`; for CIFAR-10 `cifar10_test.npz` and
    `cifar10_train_20k.npz`, the first 20,000 training images, of which the last 2,000 are the calibration split.
    What is there is never downloaded again.

    Args:
        name: "mnist", "fashion_mnist", "cifar10", "cifar100" or "svhn".
        split: "train", "calibration" or "test".
        data_dir: default the environment variable RBL_DATA, else `data_cache` in the working directory.
        download: fetch the data through torchvision where it is missing.

    Raises:
        FileNotFoundError: the data is not there; the message says how to get it.
        ValueError: unknown name or split, or damaged files.
        ConnectionError: the download failed.
    """
    source = lookup(name, SOURCES, "data set")
    check_split(split)
    folder, part = data_folder(data_dir), "test" if split == "test" else "train"
    file = folder / source.file(part)
    from_npz = file.is_file() and not source.is_there(folder, part)
    if from_npz:
        arrays = read_npz(file, [f"x_{part}", f"y_{part}"])
        images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
    elif download or source.is_there(folder, part):
        images, labels = _through_torchvision(name, source, folder, part, download)
    else:
        raise FileNotFoundError(_how_to_get(name, folder, source.file(part)))
    if split == "test":
        rows = None
    else:
        rows = tail(len(images), min(source.calibration if from_npz else 5000, len(images) // 10), split)
    return dataset(name, split, images, labels, rows, num_classes=source.num_classes)


def data_folder(data_dir: str | Path | None = None) -> Path:
    """Return the folder of the data: `data_dir`, else that of RBL_DATA, else `data_cache` in the working directory."""
    return Path(data_dir or os.environ.get("RBL_DATA") or "data_cache").expanduser()


def _how_to_get(name: str, folder: Path, file: str) -> str:
    return (
        f"the data set {name!r} is not in {folder}: download it (load_data({name!r}, download=True), or "
        f"data={name} data.download=true on the command line), put {file} there, or point data_dir or the environment "
        "variable RBL_DATA to where it is; data=digits needs no download"
    )


def _through_torchvision(name: str, source: Source, folder: Path, part: str, download: bool) -> tuple[Array, Array]:
    from torchvision import datasets  # imported here: it costs seconds that other data need not pay

    which: dict[str, Any] = {"split": part} if name == "svhn" else {"train": part == "train"}
    try:
        with warnings.catch_warnings():  # unpickling CIFAR's old batches, behind their checksums, warns since NumPy 2.4
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            found = getattr(datasets, source.torchvision)(root=str(folder), download=download, **which)
    except OSError as error:
        raise ConnectionError(f"the data set {name!r} could not be downloaded to {folder}: {error}") from error
    except RuntimeError as error:
        if download:
            raise ConnectionError(f"the data set {name!r} could not be downloaded to {folder}: {error}") from error
        raise ValueError(f"the files of {name!r} in {folder} are damaged or not complete: {error}") from error
    images = np.asarray(found.data)
    if name == "svhn":  # (N, 3, 32, 32) there; the others have the channels last, or none
        return images.transpose(0, 2, 3, 1), np.asarray(found.labels)
    return images, np.asarray(found.targets)
