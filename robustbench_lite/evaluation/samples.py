"""The samples of an evaluation: images with their labels, names and hashes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustbench_lite.core.checks import check_images, check_labels
from robustbench_lite.data.base import Dataset
from robustbench_lite.data.hashing import hash_images

__all__ = ["Samples", "as_samples"]

UNIT = 500  # samples of a unit of work, about: as many as a block of the store has, whatever a batch has


@dataclass(frozen=True, eq=False)
class Samples:
    """Some samples of one data set.

    Attributes:
        name: what records call the data.
        x: float32 (N, C, H, W), on the CPU.
        y: int64 (N,).
        indices: int64 (N,), their numbers in the whole data set.
        hashes: one image hash a sample.
        batch: int64 (N,), which of them are computed together.
        unit: int64 (N,), the unit of work that each belongs to: all methods see one unit before they see the next.
    """

    name: str
    x: Tensor
    y: Tensor
    indices: np.ndarray[Any, Any]
    hashes: list[str]
    batch: np.ndarray[Any, Any]
    unit: np.ndarray[Any, Any]

    @property
    def targets(self) -> np.ndarray[Any, Any]:
        """The labels as an array."""
        return self.y.numpy()

    def lots(self, purpose: str, seed: int) -> np.ndarray[Any, Any]:
        """Return a number in [0, 1) for each sample, by image, purpose and seed: the same in every slice."""
        digests = (hashlib.blake2b(f"{purpose} {seed} {name}".encode(), digest_size=8).digest() for name in self.hashes)
        return np.array([int.from_bytes(digest, "big") / 2**64 for digest in digests])

    def in_batches(self, size: int) -> Samples:
        """Return the samples in batches of `size`, and in units of some 500, in the order of their indices.

        They are cut once, for all samples of an evaluation. What of them is computed together later, by one process or
        by several, lies in one batch, or in a cascade in one unit, so that rounding and the draws of a stochastic model
        are the same.
        """
        batch = np.empty(len(self), dtype=np.int64)
        batch[np.argsort(self.indices, kind="stable")] = np.arange(len(self)) // size
        return replace(self, batch=batch, unit=batch // max(1, UNIT // size))

    def rebatched(self, size: int) -> Samples:
        """Return the samples in new batches: what is left of several fills one. Units stay."""
        return replace(self, batch=np.arange(len(self)) // size)

    def __len__(self) -> int:
        return len(self.hashes)

    def take(self, rows: np.ndarray[Any, Any]) -> Samples:
        """Return a copy of these rows, in this order: int64 positions, or a boolean mask."""
        places = np.flatnonzero(rows) if rows.dtype == bool else rows
        chosen = torch.from_numpy(places)
        return Samples(
            self.name,
            self.x[chosen],
            self.y[chosen],
            self.indices[places],
            [self.hashes[i] for i in places],
            self.batch[places],
            self.unit[places],
        )


def as_samples(data: Dataset | tuple[Tensor, Tensor], bounds: tuple[float, float]) -> Samples:
    """Return the samples of a data set, or of plain (images, labels), which are called "custom" and numbered from 0.

    Raises:
        TypeError: images or labels of another type.
        ValueError: no samples, images outside the bounds, or an index that comes twice.
    """
    if isinstance(data, (tuple, list)) and len(data) == 2:
        x, y = data
        check_images(x, bounds)
        check_labels(y, x)
        if len(x) == 0:
            raise ValueError("there are no samples to evaluate on")
        images = x.detach().cpu().float()
        return Samples("custom", images, y.cpu(), np.arange(len(x)), hash_images(images), *_uncut(len(x)))
    if not isinstance(data, Dataset):
        raise TypeError(
            f"data must be a Dataset, as load_data('digits') returns it, or two tensors (images, labels), got "
            f"{'a sequence of ' + str(len(data)) if isinstance(data, (tuple, list)) else type(data).__name__}"
        )
    check_images(data.images, bounds)
    indices = data.indices.cpu().numpy()
    if len(np.unique(indices)) < len(indices):
        raise ValueError("an index comes twice in the data: each sample must be there once")
    name = data.name if data.split == "test" else f"{data.name}/{data.split}"
    hashes = list(data.sample_hashes)
    return Samples(name, data.images.cpu(), data.labels.cpu(), indices, hashes, *_uncut(len(hashes)))


def _uncut(samples: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return np.zeros(samples, dtype=np.int64), np.zeros(samples, dtype=np.int64)
