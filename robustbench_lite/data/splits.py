"""Fixed splits: the same images in the same part on every machine and with every version of every library."""

from __future__ import annotations

from typing import Any

import numpy as np

from robustbench_lite.core.errors import suggest
from robustbench_lite.data.base import SPLITS

__all__ = ["CALIBRATION_SHARE", "check_split", "held_out", "stratified", "tail"]

Rows = np.ndarray[Any, np.dtype[np.int64]]

CALIBRATION_SHARE = (10, 5000)  # one image in ten, 5,000 at most


def check_split(split: str) -> None:
    """Raise a ValueError unless `split` is train, calibration or test."""
    if split not in SPLITS:
        raise ValueError(suggest(split, SPLITS, "split"))


def stratified(labels: Rows, sizes: dict[str, int], rest: str, seed: int = 0) -> dict[str, Rows]:
    """Cut rows into parts that hold every class in its share, up to rounding.

    One seeded permutation orders all rows (NumPy's legacy generator, whose stream is frozen); each class gives its
    first ones to the first part, the next ones to the second, and so on. A class's share of a part is rounded by the
    largest remainder, so that the sizes are met exactly. Rows come in the order of the permutation: data that is sorted
    by class is not sorted afterwards, and the first images of a part are a fair sample of it.

    Args:
        labels: (N,), the class of each row.
        sizes: how many rows each part gets.
        rest: the part that gets all others.
        seed: of the permutation.

    Raises:
        ValueError: the parts are larger than the whole.
    """
    order = np.random.RandomState(seed).permutation(len(labels))
    left = np.ones(len(labels), dtype=bool)
    parts: dict[str, Rows] = {}
    for part, size in sizes.items():
        quotas = _quotas(labels[left], size)
        chosen = np.zeros(len(labels), dtype=bool)
        for label, quota in quotas.items():
            of_class = order[(labels[order] == label) & left[order]]
            chosen[of_class[:quota]] = True
        parts[part] = order[chosen[order]]
        left &= ~chosen
    parts[rest] = order[left[order]]
    return parts


def _quotas(labels: Rows, size: int) -> dict[int, int]:
    if size > len(labels):
        raise ValueError(f"a part of {size} images cannot be cut from {len(labels)}")
    classes, counts = np.unique(labels, return_counts=True)
    exact = size * counts  # in units of 1 / len(labels): integers, so that no rounding error decides
    floors = exact // len(labels)
    missing = size - int(floors.sum())
    floors[np.argsort(-(exact % len(labels)), kind="stable")[:missing]] += 1
    return {int(label): int(quota) for label, quota in zip(classes, floors, strict=True)}


def held_out(labels: Rows, split: str) -> Rows:
    """Return the rows of the "train" or "calibration" part of training data whose order is not known to be random.

    Calibration is one image in ten (5,000 at most), stratified by class with seed 0; train is the rest.
    """
    share, most = CALIBRATION_SHARE
    return stratified(labels, {"calibration": min(most, len(labels) // share)}, rest="train")[split]


def tail(total: int, calibration: int, split: str) -> Rows:
    """Return the rows of the "train" or "calibration" part of shuffled training data: calibration is the last rows."""
    cut = total - calibration
    return np.arange(cut) if split == "train" else np.arange(cut, total)
