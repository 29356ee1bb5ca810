from __future__ import annotations

import numpy as np
import pytest
import torch

from robustbench_lite.core.checks import check_images, check_labels, parse_number
from robustbench_lite.core.errors import lookup, suggest


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((1, 1, 2, 2)), "torch.Tensor"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.uint8), r"x.float\(\) / 255"),
        (torch.zeros(1, 2, 2), r"\(B, C, H, W\), got \(1, 2, 2\)"),
        (torch.full((1, 1, 2, 2), 200.0), "divide by 255"),
        (torch.full((1, 1, 2, 2), -2.0), "keep normalisation inside the model"),
        (torch.tensor([[[[float("nan")]]]]), "NaN"),
        (torch.tensor([[[[float("inf")]]]]), "must lie in"),
    ],
)
def test_bad_images(x, message):
    with pytest.raises((ValueError, TypeError), match=message):
        check_images(x)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([0, 3]), r"0 .. 2, got 0 .. 3"),
        (torch.tensor([0, -1]), "got -1 .. 0"),
        (torch.tensor([0.0, 1.0]), "int64"),
        (torch.tensor([[0], [1]]), r"shape \(2,\)"),
        ([0, 1], "list"),
    ],
)
def test_bad_labels(y, message):
    with pytest.raises((ValueError, TypeError), match=message):
        check_labels(y, torch.zeros(2, 1, 2, 2), 3)


def test_numbers():
    assert parse_number("8/255") == 8 / 255
    assert parse_number(" 0.5 ") == 0.5
    assert parse_number("1e-3") == 1e-3
    for bad in ("eight", "1/0", "nan", float("inf")):
        with pytest.raises(ValueError, match="expected a"):
            parse_number(bad)


def test_suggestions():
    assert (
        suggest("PGDD", ["pgd", "fgsm"], "attack") == "unknown attack 'PGDD'; did you mean 'pgd'? there are: fgsm, pgd"
    )
    assert "did you mean" not in suggest("zzz", ["pgd"], "attack")
    assert lookup("a", {"a": 1}, "thing") == 1
