"""`digits`: the 1,797 handwritten 8x8 digits that scikit-learn carries. The embedded default: nothing to download.

Source: Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits" (its test part), 17 grey levels.
"""

from __future__ import annotations

from robustbench_lite.data.arrays import dataset
from robustbench_lite.data.base import Dataset
from robustbench_lite.data.splits import check_split, stratified

__all__ = ["digits"]

SIZES = {"test": 500, "calibration": 200}
SEED = 0


def digits(split: str = "test", *, name: str = "digits") -> Dataset:
    """Return a split of the digits: (N, 1, 8, 8), grey levels 0 .. 16 divided by 16, ten classes.

    The split is fixed: `stratified` with seed 0 gives 500 test, 200 calibration and 1,097 training images, each with
    the classes in their shares. `indices` are the positions in `sklearn.datasets.load_digits()`.

    Args:
        split: "train", "calibration" or "test".
        name: what records call the data.
    """
    check_split(split)
    from sklearn.datasets import load_digits  # imported here: it costs a second that other data need not pay

    source = load_digits()
    rows = stratified(source.target, SIZES, rest="train", seed=SEED)[split]
    return dataset(name, split, source.images / 16, source.target, rows, num_classes=10)
