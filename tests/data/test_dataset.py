from __future__ import annotations

import dataclasses
import hashlib
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustbench_lite.data import Dataset


def some(n: int = 12, size: int = 5, channels: int = 2, classes: int = 4) -> Dataset:
    images = torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0))
    return Dataset("some", "test", images, torch.arange(n) % classes, torch.arange(n) * 7, classes)


@given(st.lists(st.integers(0, 11), min_size=1, max_size=20))
@settings(deadline=None, max_examples=25)
def test_a_slice_keeps_what_belongs_to_each_image(rows: list[int]) -> None:
    data = some()
    part = data.take(rows)
    assert len(part) == len(rows)
    assert part.indices.tolist() == [7 * row for row in rows]
    assert part.labels.tolist() == [row % 4 for row in rows]
    assert part.sample_hashes == [data.sample_hashes[row] for row in rows]
    assert torch.equal(part.images, data.images[rows])


def test_rows_may_be_a_mask_an_array_a_slice_or_a_tensor() -> None:
    data = some()
    mask = torch.zeros(12, dtype=torch.bool)
    mask[[1, 4]] = True
    for rows in (mask, mask.numpy(), np.array([1, 4]), slice(1, 5, 3), torch.tensor([1, 4])):
        assert data.take(rows).indices.tolist() == [7, 28]


def test_hashes_follow_the_documented_formula() -> None:
    data = some()
    image = data.images[3].numpy()
    expected = hashlib.sha256(b"2x5x5:" + image.astype("<f4").tobytes()).hexdigest()[:16]
    assert data.sample_hashes[3] == expected


def test_hashes_see_pixels_and_shape_but_neither_label_nor_number_nor_memory_order() -> None:
    data = some()
    relabelled = dataclasses.replace(data, labels=data.labels.flip(0), indices=data.indices + 1)
    strided = dataclasses.replace(data, images=data.images.to(memory_format=torch.channels_last))
    assert relabelled.sample_hashes == strided.sample_hashes == data.sample_hashes
    nudged = data.images.clone()
    nudged[2, 0, 0, 0] = torch.nextafter(nudged[2, 0, 0, 0], torch.tensor(0.0))
    changed = dataclasses.replace(data, images=nudged).sample_hashes
    assert [k for k in range(12) if changed[k] != data.sample_hashes[k]] == [2]
    reshaped = dataclasses.replace(data, images=data.images.reshape(12, 1, 10, 5))
    assert not set(reshaped.sample_hashes) & set(data.sample_hashes)


def test_the_content_hash_sees_images_labels_and_order() -> None:
    data = some()
    assert data.content_hash == some().content_hash == data.take(slice(None)).content_hash
    others = [
        data.head(11),
        data.take(list(range(11, -1, -1))),
        dataclasses.replace(data, labels=(data.labels + 1) % 4),
    ]
    assert len({data.content_hash, *(other.content_hash for other in others)}) == 4


def test_a_sample_is_seeded_ordered_and_without_repeats() -> None:
    data = some()
    first, again, other = data.sample(6, seed=1), data.sample(6, seed=1), data.sample(6, seed=2)
    assert torch.equal(first.indices, again.indices)
    assert not torch.equal(first.indices, other.indices)
    assert first.indices.tolist() == sorted(set(first.indices.tolist()))
    counts = torch.stack([torch.isin(data.indices, data.sample(6, seed).indices) for seed in range(200)]).sum(0)
    assert ((counts > 70) & (counts < 130)).all()  # 100 expected, standard deviation 7


def test_hashing_ten_thousand_images_is_quick() -> None:
    n = 10_000
    data = Dataset("big", "test", torch.rand(n, 1, 28, 28), torch.zeros(n).long(), torch.arange(n), 1)
    start = time.perf_counter()
    assert len(data.content_hash) == 16
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"images": torch.rand(12, 5, 5)},
            ValueError,
            r"data 'some', split 'test': .*, got \(12, 5, 5\)",
        ),
        ({"images": torch.rand(12, 2, 5, 5).double()}, TypeError, "float32, got torch.float64"),
        ({"images": torch.full((12, 2, 5, 5), 200, dtype=torch.uint8)}, TypeError, "255"),
        ({"images": torch.full((12, 2, 5, 5), 200.0)}, ValueError, "divide by 255"),
        ({"images": torch.full((12, 2, 5, 5), -0.5)}, ValueError, "normalisation inside the model"),
        ({"images": torch.full((12, 2, 5, 5), torch.nan)}, ValueError, "NaN"),
        ({"images": torch.rand(0, 2, 5, 5)}, ValueError, "no images"),
        ({"labels": torch.arange(12)}, ValueError, r"labels must be in 0 .. 3, got 0 .. 11"),
        ({"labels": torch.full((12,), -1)}, ValueError, "got -1"),
        ({"labels": torch.zeros(12, dtype=torch.int32)}, TypeError, "int64"),
        ({"labels": torch.zeros(11).long()}, ValueError, r"\(12,\).*\(11,\)"),
        ({"indices": torch.arange(11)}, ValueError, r"indices must have shape \(12,\)"),
        ({"indices": torch.arange(12).float()}, TypeError, "indices must be an int64"),
        ({"num_classes": 0}, ValueError, "num_classes must be >= 1"),
        ({"split": "tset"}, ValueError, "train, calibration, test"),
    ],
)
def test_what_is_not_a_data_set_is_refused(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dataclasses.replace(some(), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [0, -1, 13])
def test_a_slice_must_fit(n: int) -> None:
    with pytest.raises(ValueError, match="has 12 images, asked for"):
        some().head(n)
    with pytest.raises(ValueError, match="has 12 images, asked for"):
        some().sample(n, seed=0)


def test_rows_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="no rows chosen"):
        some().take([])
    with pytest.raises(ValueError, match=r"mask has shape \(3,\), expected \(12,\)"):
        some().take(torch.ones(3, dtype=torch.bool))
    with pytest.raises(IndexError):
        some().take([12])
