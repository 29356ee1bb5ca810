"""`npz`: any NumPy archive with `x_train`, `y_train`, `x_test`, `y_test` (or one of the two pairs)."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from robustbench_lite.data.arrays import dataset, labels_tensor
from robustbench_lite.data.base import Dataset
from robustbench_lite.data.splits import check_split, held_out

__all__ = ["npz", "read_npz"]

Array = np.ndarray[Any, Any]


def npz(
    path: str | Path,
    split: str = "test",
    *,
    name: str | None = None,
    num_classes: int | None = None,
    layout: str | None = None,
) -> Dataset:
    """Return a split of a `.npz` file. Nothing in it is ever unpickled, and only the arrays that are needed are read.

    "test" is x_test, y_test. "calibration" is one image in ten of x_train, y_train (5,000 at most), stratified by class
    with seed 0; "train" is the rest. `indices` are the positions in the array.

    Args:
        path: the file. Images (N, H, W), (N, H, W, C) or (N, C, H, W), uint8 or floating in [0, 1]; labels (N,).
        split: "train", "calibration" or "test".
        name: what records call the data; default the file's name without its ending.
        num_classes: default 1 + the highest label in the file.
        layout: "NHW", "NHWC" or "NCHW" where the shape does not tell.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no archive of plain arrays, or lacks those of the split.
    """
    check_split(split)
    part = "test" if split == "test" else "train"
    arrays = read_npz(path, [f"x_{part}", f"y_{part}"], also=["y_train", "y_test"])
    images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
    rows = None if split == "test" else held_out(labels_tensor(labels).numpy(), split)
    if num_classes is None:
        num_classes = 1 + max(int(labels_tensor(arrays[key]).max()) for key in ("y_train", "y_test") if key in arrays)
    return dataset(name or Path(path).stem, split, images, labels, rows, num_classes=num_classes, layout=layout)


def read_npz(path: str | Path, needed: list[str], also: list[str] | None = None) -> Mapping[str, Array]:
    """Return arrays of a `.npz` file: those `needed`, and those of `also` that are there.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no archive, it holds pickled objects, or it lacks an array.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no data file {file}")
    with file.open("rb") as stream:  # opened here: NumPy leaves the file of a damaged archive open
        try:
            archive = np.load(stream, allow_pickle=False)
        except (BadZipFile, EOFError, ValueError) as error:
            raise ValueError(f"{file} is no .npz archive ({error}); write one with numpy.savez_compressed") from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError(f"{file} holds one array, not an archive; write one with numpy.savez_compressed")
        missing = [key for key in needed if key not in archive.files]
        if missing:
            raise ValueError(f"{file} has no {', '.join(missing)}; it has: {', '.join(sorted(archive.files))}")
        try:
            return {key: archive[key] for key in dict.fromkeys([*needed, *(also or [])]) if key in archive.files}
        except (BadZipFile, EOFError, ValueError, zlib.error) as error:
            raise ValueError(f"{file}: an array cannot be read ({error}); pickled objects never are") from error
