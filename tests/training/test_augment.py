from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from robustbench_lite.core.rng import Streams
from robustbench_lite.training.augment import CropFlip


def streams(indices: torch.Tensor, seed: int = 0) -> Streams:
    return Streams.from_generator(torch.Generator().manual_seed(seed), indices)


def test_every_image_is_a_window_of_its_padded_self_or_the_mirror_of_one() -> None:
    x = torch.rand(40, 3, 5, 6)
    out = CropFlip(2)(x, streams(torch.arange(40)))
    padded = F.pad(x, (2, 2, 2, 2))
    met = set()
    for image, source in zip(out, padded, strict=True):
        windows = {
            (i, j, m): source[:, i : i + 5, j : j + 6] for i in range(5) for j in range(5) for m in (False, True)
        }
        hits = [k for k, window in windows.items() if torch.equal(image, window.flip(2) if k[2] else window)]
        assert hits
        met.add(hits[0])
    assert len(met) > 20  # of 50
    assert {m for _, _, m in met} == {False, True}


def test_what_a_sample_meets_depends_on_its_index_alone() -> None:
    x, indices = torch.rand(8, 1, 6, 6), torch.arange(8)
    order = torch.tensor([5, 2, 7])
    augment = CropFlip(3)
    assert torch.equal(augment(x, streams(indices))[order], augment(x[order], streams(order)))


def test_no_padding_and_no_flip_change_nothing() -> None:
    x = torch.rand(4, 2, 5, 5)
    assert torch.equal(CropFlip(0, flip=False)(x, streams(torch.arange(4))), x)
    with pytest.raises(ValueError, match="padding must be >= 0"):
        CropFlip(-1)
