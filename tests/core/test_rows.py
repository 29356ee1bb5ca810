"""Rows written and chosen."""

from __future__ import annotations

import pytest
import torch

from robustbench_lite.core.rows import pick, put


@pytest.mark.parametrize("taken", [[], [1, 3], [0, 1, 2, 3]])
def test_pick_is_where_along_rows_and_shares_no_memory(taken):
    chosen, other = torch.rand(4, 2, 3), torch.rand(4, 2, 3)
    condition = torch.zeros(4, dtype=torch.bool)
    condition[taken] = True
    result = pick(condition, chosen, other)
    assert torch.equal(result, torch.where(condition.reshape(4, 1, 1), chosen, other))
    before = chosen.clone(), other.clone()
    result.zero_()
    assert torch.equal(chosen, before[0]) and torch.equal(other, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("rows", [[], [2], [3, 0], [0, 1, 2, 3]])
def test_put_is_index_copy(dtype, rows):
    target, values = (
        torch.randint(9, (4, 2, 3)).to(dtype),
        torch.randint(9, (len(rows), 3, 2)).to(dtype).transpose(1, 2),
    )
    expected = target.index_copy(0, torch.tensor(rows, dtype=torch.int64), values)
    put(target, torch.tensor(rows, dtype=torch.int64), values)
    assert torch.equal(target, expected)


@pytest.mark.parametrize("values", [torch.rand(2, 1, 3), torch.rand(1, 2, 3), torch.rand(2, 2, 3).double()])
def test_put_refuses_what_does_not_fit(values):
    with pytest.raises((RuntimeError, IndexError)):
        put(torch.rand(4, 2, 3), torch.tensor([0, 2]), values)


def test_put_is_seen_by_autograd():
    target = torch.rand(4, 3)
    weight = torch.rand(3, requires_grad=True)
    answer = (target * weight).sum()
    put(target, torch.tensor([1]), torch.zeros(1, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        answer.backward()


def test_put_works_in_inference_mode():
    with torch.inference_mode():
        target = torch.zeros(2, 3)
        put(target, torch.tensor([1]), torch.ones(1, 3))
        assert float(target.sum()) == 3
