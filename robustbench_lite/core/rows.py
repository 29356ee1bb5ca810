"""Choices between whole rows of two batches."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pick"]


def pick(condition: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """Return a new batch (n, ...): the row of `chosen` where `condition`, bool (n,), holds, else that of `other`.

    On a CPU by positions: `torch.where` takes about seven times as long as a copy there. On a GPU, where to know the
    positions would be to wait, by `torch.where`.
    """
    if condition.device.type != "cpu":
        return torch.where(condition.reshape(-1, *(1,) * (other.ndim - 1)), chosen, other)
    rows = condition.nonzero().flatten()
    if rows.numel() == 0:
        return other.clone()
    if rows.numel() == condition.numel():
        return chosen.clone()
    return other.index_copy(0, rows, chosen.index_select(0, rows))
