"""`image_folder`: any folder of image files, one subfolder a class, as torchvision's `ImageFolder` reads it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from robustbench_lite.data.arrays import images_tensor
from robustbench_lite.data.base import Dataset
from robustbench_lite.data.splits import check_split, held_out

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["image_folder"]

Array = np.ndarray[Any, Any]
MODES = {1: "L", 3: "RGB"}


def image_folder(
    path: str | Path,
    split: str = "test",
    *,
    name: str | None = None,
    image_size: int | None = None,
    channels: int = 3,
) -> Dataset:
    """Return a split of `path/train/<class>/*.png`, `path/test/<class>/*.png` (or .jpg, ...).

    Classes are numbered by name, over all splits together. "calibration" is `path/calibration` where there is one;
    otherwise one image in ten of `path/train` (5,000 at most), stratified by class with seed 0, and "train" the rest.
    `indices` are the positions in the sorted list of the split's files. All images are held in memory.

    Args:
        path: the folder.
        split: "train", "calibration" or "test".
        name: what records call the data; default the folder's name.
        image_size: the shorter side is resized to this (bilinear, antialiased), then the centre is cut out square.
            None: images stay as they are and must all have one size.
        channels: 3 (colour) or 1 (grey); images are converted.

    Raises:
        FileNotFoundError: no such folder, or no images in it.
        ValueError: images of several sizes without `image_size`; a file that cannot be read as an image.
    """
    check_split(split)
    if channels not in MODES:
        raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {channels}")
    root = Path(path).expanduser()
    own = split == "test" or (root / split).is_dir()
    files, labels, classes = _listing(root, split if own else "train")
    whole = own and (split == "test" or (root / "calibration").is_dir())
    rows = np.arange(len(files)) if whole else held_out(labels, split)
    images = images_tensor(_read([files[row] for row in rows], image_size, MODES[channels]), "NHWC")
    title = name or root.resolve().name
    return Dataset(title, split, images, torch.from_numpy(labels[rows]), torch.from_numpy(rows), len(classes))


def _listing(root: Path, part: str) -> tuple[list[str], Array, list[str]]:
    from torchvision.datasets import ImageFolder  # imported here: it costs seconds that other data need not pay

    if not (root / part).is_dir():
        raise FileNotFoundError(
            f"no folder {root / part}; expected {root}/train/<class>/*.png and {root}/test/<class>/*.png"
        )
    splits = [root / name for name in ("train", "calibration", "test") if (root / name).is_dir()]
    classes = sorted({folder.name for split in splits for folder in split.iterdir() if folder.is_dir()})
    try:
        found = ImageFolder(str(root / part), allow_empty=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no class folders in {root / part}: expected {root / part}/<class>/*.png") from error
    if not found.samples:
        raise FileNotFoundError(f"no images in {root / part}: expected {root / part}/<class>/*.png")
    number = {name: k for k, name in enumerate(classes)}  # a split that lacks a class must not number the others anew
    labels = np.array([number[found.classes[own]] for _, own in found.samples], dtype=np.int64)
    return [file for file, _ in found.samples], labels, classes


def _read(files: list[str], image_size: int | None, mode: str) -> Array:
    from PIL import Image, UnidentifiedImageError

    arrays = []
    for file in files:
        try:
            with Image.open(file) as image:
                arrays.append(np.asarray(_square(image.convert(mode), image_size), dtype=np.uint8))
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"{file} cannot be read as an image: {error}") from error
        if arrays[-1].shape != arrays[0].shape:
            sizes = [f"{a.shape[1]}x{a.shape[0]}" for a in (arrays[0], arrays[-1])]
            raise ValueError(f"{file} is {sizes[1]}, {files[0]} is {sizes[0]}: say image_size=... to bring them to one")
    images = np.stack(arrays)
    return images[..., None] if images.ndim == 3 else images


def _square(image: Image, size: int | None) -> Image:
    if size is None:
        return image
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), 2).crop((left, top, left + size, top + size))  # 2: bilinear, antialiased
