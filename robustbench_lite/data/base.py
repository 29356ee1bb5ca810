"""What a data set is to the suite: checked images in [0, 1], their labels, and names that depend on content alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from robustbench_lite.core.checks import check_images, check_labels
from robustbench_lite.data.hashing import hash_images, hash_slice

__all__ = ["SPLITS", "Dataset"]

SPLITS = ("train", "calibration", "test")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images, checked when they are put together.

    Attributes:
        name: what records call the data set.
        split: "train", "calibration" or "test".
        images: float32 (N, C, H, W) in [0, 1]; N >= 1.
        labels: int64 (N,) in 0 .. num_classes - 1.
        indices: int64 (N,), the numbers of the images in the source they came from; a slice keeps them.
        num_classes: number of classes of the whole data set.

    Raises:
        TypeError: images that are not float32, labels or indices that are not int64.
        ValueError: no images, a wrong shape, a pixel outside [0, 1], a label out of range.
    """

    name: str
    split: str
    images: Tensor
    labels: Tensor
    indices: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        """Check every field; the message starts with the name of the data."""
        try:
            _check(self)
        except (TypeError, ValueError) as error:
            raise type(error)(f"data {self.name!r}, split {self.split!r}: {error}") from None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: Tensor | np.ndarray | Sequence[int] | slice) -> Dataset:
        """Return these rows in this order: positions in this data set, or a boolean mask. `indices` go with them.

        Raises:
            IndexError: a row that is not there.
            ValueError: no rows at all, or a mask of another length.
        """
        positions = torch.arange(len(self))
        if isinstance(rows, slice):
            chosen = positions[rows]
        else:
            wanted = torch.as_tensor(rows).cpu()
            if wanted.dtype == torch.bool and wanted.shape != positions.shape:
                raise ValueError(f"the mask has shape {tuple(wanted.shape)}, expected ({len(self)},)")
            chosen = positions[wanted if wanted.numel() else wanted.long()]
        if not len(chosen):
            raise ValueError(f"data {self.name!r}, split {self.split!r}: no rows chosen")
        at = chosen.to(self.images.device)
        return replace(self, images=self.images[at], labels=self.labels[at], indices=self.indices[chosen])

    def head(self, n: int) -> Dataset:
        """Return the first `n` images; ValueError unless 1 <= n <= len."""
        return self.take(slice(self._number(n)))

    def sample(self, n: int, seed: int) -> Dataset:
        """Return `n` different images drawn uniformly, in their old order; the same ones for the same seed, for ever.

        Raises:
            ValueError: unless 1 <= n <= len.
        """
        order = np.random.RandomState(seed).permutation(len(self))  # legacy streams are frozen by NumPy's promise
        return self.take(np.sort(order[: self._number(n)]))

    @cached_property
    def sample_hashes(self) -> list[str]:
        """One name an image (`hash_images`); the same in every slice that holds the image."""
        return hash_images(self.images)

    @cached_property
    def content_hash(self) -> str:
        """The name of exactly these images with these labels in this order."""
        return hash_slice(self.sample_hashes, self.labels.tolist())

    def _number(self, n: int) -> int:
        if not 1 <= n <= len(self):
            raise ValueError(f"data {self.name!r}, split {self.split!r} has {len(self)} images, asked for {n}")
        return int(n)


def _check(data: Dataset) -> None:
    if data.split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}")
    check_images(data.images)
    if data.images.dtype != torch.float32:
        raise TypeError(f"images must be float32, got {data.images.dtype}: images.float()")
    if not data.images.numel():
        raise ValueError(f"there are no images: shape {tuple(data.images.shape)}")
    if data.num_classes < 1:
        raise ValueError(f"num_classes must be >= 1, got {data.num_classes}")
    check_labels(data.labels, data.images, data.num_classes)
    if not isinstance(data.indices, Tensor) or data.indices.dtype != torch.int64:
        raise TypeError(
            f"indices must be an int64 tensor, got {getattr(data.indices, 'dtype', type(data.indices).__name__)}"
        )
    if data.indices.shape != data.labels.shape:
        raise ValueError(f"indices must have shape ({len(data)},), one for each image, got {tuple(data.indices.shape)}")
