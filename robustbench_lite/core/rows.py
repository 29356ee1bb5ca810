"""Whole rows of batches, written and chosen."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pick", "put"]


@torch.no_grad()
def put(target: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write `values` (n, ...) to the rows int64 (n,) of `target` (N, ...), in place, as `index_copy_` does.

    On a CPU through NumPy, which copies row by row: PyTorch goes value by value, and takes about seven times as long.

    Raises:
        RuntimeError: values of another dtype.
        IndexError: values of another shape.
    """
    known = target.dtype == values.dtype and target.dtype in (torch.float32, torch.float64)
    if known and target.device.type == "cpu" and values.shape == (len(rows), *target.shape[1:]):
        target.detach().numpy()[rows.numpy()] = values.detach().numpy()
        if not target.is_inference():
            torch.autograd.graph.increment_version(target)
    else:
        target.index_copy_(0, rows, values)


@torch.no_grad()
def pick(condition: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """Return a new batch (n, ...): the row of `chosen` where `condition`, bool (n,), holds, else that of `other`.

    It is made for the values of a search: no gradient goes through it.

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
    chosen, found = chosen.index_select(0, rows), other.clone()
    put(found, rows, chosen)
    return found
