"""From the arrays people keep images in to what a `Dataset` holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustbench_lite.core.errors import lookup
from robustbench_lite.data.base import Dataset

__all__ = ["LAYOUTS", "dataset", "images_tensor", "labels_tensor"]

Array = np.ndarray[Any, Any]

LAYOUTS = {"NHW": (0, 1, 2), "NHWC": (0, 3, 1, 2), "NCHW": (0, 1, 2, 3)}
CHANNELS = (1, 3, 4)  # sizes of an axis that can be taken for channels


def images_tensor(images: Array, layout: str | None = None) -> Tensor:
    """Return images as float32 (N, C, H, W).

    uint8 is divided by 255 (by NumPy: correctly rounded, hence the same bits everywhere; a GPU multiplies by the
    reciprocal). Floats are taken as they are: `Dataset` refuses them outside [0, 1].

    Args:
        images: (N, H, W), (N, H, W, C) or (N, C, H, W); uint8 or floating.
        layout: "NHW", "NHWC" or "NCHW". None: the axis of size 1, 3 or 4 holds the channels.

    Raises:
        TypeError: another type of number.
        ValueError: another rank, or no telling which axis holds the channels.
    """
    layout = layout or _guess(images.shape)
    axes = lookup(layout, LAYOUTS, "layout")
    if images.ndim != len(axes):
        raise ValueError(f"layout {layout} means {len(axes)} axes, the images have shape {images.shape}")
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise TypeError(f"images must be uint8 (0 to 255) or floating point in [0, 1], got {images.dtype}")
    pixels = images.transpose(axes).astype(np.float32, order="C")
    if images.dtype == np.uint8:
        pixels /= np.float32(255)
    return torch.from_numpy(pixels[:, None] if pixels.ndim == 3 else pixels)


def _guess(shape: tuple[int, ...]) -> str:
    if len(shape) == 3:
        return "NHW"
    if len(shape) != 4:
        raise ValueError(f"images must be (N, H, W), (N, H, W, C) or (N, C, H, W), got shape {shape}")
    first, last = shape[1] in CHANNELS, shape[3] in CHANNELS
    if first == last:
        raise ValueError(f"cannot tell which axis of shape {shape} holds the channels: say layout=NHWC or layout=NCHW")
    return "NCHW" if first else "NHWC"


def labels_tensor(labels: Array) -> Tensor:
    """Return labels (N,) or (N, 1), of any integer type, as int64 (N,).

    Raises:
        TypeError: labels that are not integers.
        ValueError: another shape, such as one-hot rows.
    """
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise ValueError(f"labels must have shape (N,), got {labels.shape}; one-hot rows: labels.argmax(1)")
    return torch.from_numpy(labels.astype(np.int64))


def dataset(
    name: str,
    split: str,
    images: Array,
    labels: Array,
    rows: Array | None = None,
    *,
    num_classes: int,
    layout: str | None = None,
) -> Dataset:
    """Put a `Dataset` together from arrays; `rows` (default all) are those of the split and become its `indices`.

    Raises:
        TypeError: numbers of a type that cannot be images or labels.
        ValueError: images and labels that do not fit each other, or what `Dataset` refuses.
    """
    if len(images) != len(labels):
        raise ValueError(f"data {name!r}: {len(images)} images but {len(labels)} labels")
    if rows is None:
        rows = np.arange(len(images))
    try:
        x, y = images_tensor(images[rows], layout), labels_tensor(labels[rows])
    except (TypeError, ValueError) as error:
        raise type(error)(f"data {name!r}, split {split!r}: {error}") from None
    return Dataset(name, split, x, y, torch.from_numpy(rows.astype(np.int64)), num_classes)
