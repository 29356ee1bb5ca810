"""Choices between rows."""

from __future__ import annotations

import pytest
import torch

from robustbench_lite.core.rows import pick


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
